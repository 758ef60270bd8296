"""Transfers over shared links: closed forms, conservation, and what a change touches."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from network_cases import begin, network, rows

from hardware_models.parts import load_node
from hardware_models.schema import Cluster
from sim.processes.exact_time import ExactEnvironment
from sim.processes.network import Network
from sim.state.links import Routes

EXACT = 1e-12


def arrivals(net, sends):
    """`sends`: (start, path, bytes); returns when each arrives."""
    log = []
    for name, (start_s, path, num_bytes) in enumerate(sends):
        begin(net, start_s, path, num_bytes, log, name)
    net.environment.run()
    return [instant for _, instant in sorted(log)]


def test_one_flow_takes_latency_plus_bytes_over_bandwidth():
    net = network([100.0, 50.0], [0.25, 0.5])
    assert arrivals(net, [(1.0, (0, 1), 200.0)]) == pytest.approx([1 + 0.75 + 4], rel=EXACT)


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_n_flows_on_one_link_take_n_times_as_long(count):
    net = network([100.0], [0.5])
    got = arrivals(net, [(0.0, (0,), 300.0)] * count)
    assert got == pytest.approx([0.5 + 3 * count] * count, rel=EXACT)


def test_a_bottleneck_shared_by_unequal_paths():
    """Two flows share link 0 (10); one of them and a third share link 1 (100): rates 5, 5, 95."""
    net = network([10.0, 100.0])
    got = arrivals(net, [(0.0, (0,), 50.0), (0.0, (0, 1), 25.0), (0.0, (1,), 950.0)])
    # At 5 s the second is done: the first goes on at 10, the third at 100.
    assert got == pytest.approx([5 + 25 / 10, 5.0, 5 + (950 - 475) / 100], rel=EXACT)


def test_a_flow_that_comes_later_slows_the_first_and_leaves_it_the_rest():
    got = arrivals(network([10.0]), [(0.0, (0,), 100.0), (4.0, (0,), 20.0)])
    assert got == pytest.approx([12.0, 8.0], rel=EXACT)


def test_no_bytes_cost_the_latency_alone():
    assert arrivals(network([10.0], [0.5]), [(1.0, (0,), 0.0)]) == [1.5]


def test_a_slower_link_slows_a_flow_from_that_instant_and_a_dead_one_stops_it():
    net = network([10.0])
    log = []
    begin(net, 0.0, (0,), 100.0, log, "flow")

    def trouble():
        yield net.environment.timeout(5)
        net.set_link_capacity(0, 5.0)
        yield net.environment.timeout(2)
        net.set_link_capacity(0, 0.0)
        yield net.environment.timeout(10)
        net.set_capacity("a0", "b0", 20.0)

    net.environment.process(trouble())
    net.environment.run()
    assert log == [("flow", pytest.approx(17 + 40 / 20, rel=EXACT))]


def test_one_slow_link_of_a_symmetric_pattern_slows_its_own_flow_only():
    net = network([10.0] * 20)
    done = net.send(rows(*[(i,) for i in range(20)]), 100.0)
    net.environment.run(until=5)
    assert net.shared.num_classes == 1
    net.set_link_capacity(6, 2.0)
    net.environment.run(until=6)
    assert net.shared.num_classes == 2
    net.environment.run()
    assert done.arrives_s == pytest.approx(5 + 50 / 2, rel=EXACT)
    assert net.carried_bytes()[::2] == pytest.approx([100.0] * 20, rel=EXACT)


def test_an_aborted_transfer_never_fires_and_frees_its_links():
    net = network([10.0])
    log = []
    begin(net, 0.0, (0,), 100.0, log, "kept")
    victim = net.send(rows((0,)), 100.0)

    def stop():
        yield net.environment.timeout(4)
        net.abort(victim)

    net.environment.process(stop())
    net.environment.run()
    assert log == [("kept", pytest.approx(4 + 80 / 10, rel=EXACT))]
    assert not victim.triggered
    assert net.carried_bytes()[0] == pytest.approx(120.0, rel=EXACT)
    with pytest.raises(ValueError, match="not under way"):
        net.abort(victim)


def test_part_of_a_symmetric_pattern_can_be_aborted():
    net = network([10.0, 10.0])
    keep = net.send(rows((0,)), 100.0)
    drop = net.send(rows((1,)), 100.0)
    for _ in range(10):
        net.send(rows((0,), (1,)), 100.0)
    net.environment.run(until=11)
    net.abort(drop)
    net.environment.run()
    left = 100 - 10 * 11 / 11
    assert keep.arrives_s == pytest.approx(11 + 11 * left / 10, rel=EXACT)
    assert net.carried_bytes()[[0, 2]] == pytest.approx([1100.0, 1010.0], rel=EXACT)


def test_a_change_computes_rates_only_for_the_flows_that_links_connect():
    net = network([10.0, 10.0, 10.0])
    for path in ((0,), (0, 1), (2,)):
        net.send(rows(path), 1000.0)
    net.environment.run(until=1)
    before = net.shared.solved_classes
    net.send(rows((2,)), 10.0)
    net.environment.run(until=2)
    assert net.shared.solved_classes - before == 2


def test_work_grows_with_the_transfers():
    """Each is settled as it begins and as it ends, though each ends before those before it."""
    net = network([1.0] * 100)
    settles, log = [], []
    change = net.shared.change
    net.shared.change = lambda *arguments: settles.append(arguments) or change(*arguments)
    for i in range(100):
        begin(net, 0.1 * i, (i,), 100.0 - i, log, i)
    net.environment.run()
    assert [name for name, _ in log] == list(range(99, -1, -1))
    assert len(settles) == 2 * 100


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_bytes_are_conserved_and_no_link_carries_more_than_it_can(data):
    draw = data.draw
    bandwidths = draw(st.lists(st.sampled_from([1.0, 2.0, 5.0]), min_size=1, max_size=5))
    net = network(bandwidths)
    links = st.lists(st.integers(0, len(bandwidths) - 1), min_size=1, max_size=4, unique=True)
    send = st.tuples(st.integers(0, 6).map(float), links, st.integers(1, 50).map(float))
    sends = draw(st.lists(send, min_size=1, max_size=14))
    ends = arrivals(net, sends)
    want = np.zeros(len(bandwidths))
    for _, path, num_bytes in sends:
        want[path] += num_bytes
    assert net.carried_bytes()[::2] == pytest.approx(want, rel=1e-9)
    assert net.delivered_bytes == pytest.approx(sum(size for *_, size in sends))
    for (start_s, path, num_bytes), end_s in zip(sends, ends, strict=True):
        alone_s = num_bytes / min(bandwidths[link] for link in path)
        assert end_s >= start_s + alone_s * (1 - 1e-9)
    assert (want <= np.array(bandwidths) * max(ends) * (1 + 1e-9)).all()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_flows_found_in_classes_arrive_as_flows_one_by_one(data):
    """Sent together they are searched for classes; sent by few at once, each is its own."""
    draw = data.draw
    bandwidths = draw(st.lists(st.sampled_from([1.0, 2.0]), min_size=2, max_size=6))
    links = st.lists(st.integers(0, len(bandwidths) - 1), min_size=1, max_size=3, unique=True)
    paths = draw(st.lists(links, min_size=9, max_size=30))
    sizes = draw(st.lists(st.sampled_from([3.0, 4.0]), min_size=len(paths), max_size=len(paths)))
    sends = [(0.0, path, size) for path, size in zip(paths, sizes, strict=True)]
    together = arrivals(network(bandwidths), sends)
    singly = network(bandwidths)
    singly.shared._few = lambda begin, near: True
    assert together == pytest.approx(arrivals(singly, sends), rel=1e-9)


def test_an_all_to_all_of_a_whole_cluster_is_three_classes_of_flows():
    cluster = Cluster(name="c", node=load_node("h100_sxm_x8"), num_nodes=16, source="test")
    net = Network(ExactEnvironment(), Routes(cluster))
    ranks = np.arange(128)
    pairs = np.array([(i, j) for i in ranks for j in ranks if i != j])
    done = net.transfer_all(pairs[:, 0], pairs[:, 1], 1e6)
    net.environment.run(until=1e-9)
    assert net.shared.num_classes == 3
    net.environment.run()
    latency_s = 2 * 5e-6 + 3e-6
    assert done.arrives_s == pytest.approx(latency_s + 120 * 1e6 / 50e9, rel=1e-9)


@pytest.mark.parametrize("num_bytes", [-1.0, float("nan"), float("inf")])
def test_bytes_that_make_no_sense_are_refused(num_bytes):
    with pytest.raises(ValueError, match="must be zero or more and finite"):
        network([1.0]).send(rows((0,)), num_bytes)


def test_unknown_devices_and_links_are_refused_with_what_there_is():
    net = Network(ExactEnvironment(), Routes(load_node("h100_sxm_x8")))
    with pytest.raises(ValueError, match=r"'gpu9' is not in node h100_sxm_x8; there are: cpu"):
        net.transfer("gpu0", "gpu9", 1.0)
    with pytest.raises(ValueError, match=r"no link leads from 'gpu0' to 'gpu1'.*gpu_switch, pcie0"):
        net.set_capacity("gpu0", "gpu1", 1.0)
    with pytest.raises(ValueError, match="bytes_per_s=-1"):
        net.set_capacity("gpu0", "gpu_switch", -1)
    with pytest.raises(ValueError, match="must be from 0 to 7"):
        net.transfer_all([0], [8], 1.0)


@pytest.mark.parametrize(("stops_s", "outage_s"), [(0.0, 3.0), (4.0, 0.5), (9.75, 100.0)])
def test_a_link_that_stops_and_comes_back_delays_a_transfer_by_exactly_the_outage(
    stops_s, outage_s
):
    net = network([10.0, 20.0])
    transfer = net.send(rows((0, 1)), 100.0)

    def outage():
        yield net.environment.timeout(stops_s)
        net.set_link_capacity(2, 0.0)
        yield net.environment.timeout(outage_s)
        net.set_link_capacity(2, 20.0)

    net.environment.process(outage())
    net.environment.run()
    assert transfer.arrives_s == pytest.approx(100 / 10 + outage_s, rel=EXACT)
