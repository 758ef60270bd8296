"""Collectives in closed form and as flows: known values; agreement on an idle network."""

import numpy as np
import pytest

from hardware_models.parts import load_node
from hardware_models.schema import Cluster
from sim.costs.alpha_beta import (
    ALGORITHMS,
    Group,
    Hop,
    all_to_all_uneven_s,
    collective_s,
    group_of,
)
from sim.processes.collectives import Collectives
from sim.processes.exact_time import ExactEnvironment
from sim.processes.network import Network
from sim.state.links import Routes

EIGHT = Group(8, 1, Hop(2.0, 100.0), Hop(0.0, 1.0))
FOUR_BY_TWO = Group(4, 2, Hop(2.0, 100.0), Hop(5.0, 10.0))
CASES = [(operation, name) for operation, known in ALGORITHMS.items() for name in known]


@pytest.mark.parametrize(
    ("operation", "algorithm", "seconds"),
    [
        ("all_reduce", "ring", 14 * (2 + 1)),
        ("all_reduce", "tree", 6 * (2 + 8)),
        ("reduce_scatter", "ring", 7 * (2 + 1)),
        ("all_gather", "ring", 7 * (2 + 1)),
        ("all_to_all", "direct", 2 + 7),
        ("all_to_all", "pairwise", 7 * (2 + 1)),
        ("broadcast", "chain", 7 * 2 + 8),
        ("broadcast", "tree", 3 * (2 + 8)),
        ("send_recv", "direct", 2 + 8),
    ],
)
def test_eight_ranks_of_one_node_by_hand(operation, algorithm, seconds):
    assert collective_s(operation, 800.0, EIGHT, algorithm) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("operation", "algorithm", "seconds"),
    [
        ("all_reduce", "ring", 2 * (3 * (2 + 2) + 1 * (5 + 10))),
        ("all_reduce", "tree", 2 * (2 * (2 + 8) + 1 * (5 + 80))),
        ("all_to_all", "direct", 5 + 40),
        ("all_to_all", "pairwise", 7 * (5 + 10)),
        ("broadcast", "chain", 3 * 2 + 5 + 80),
    ],
)
def test_two_nodes_of_four_by_hand(operation, algorithm, seconds):
    assert collective_s(operation, 800.0, FOUR_BY_TWO, algorithm) == pytest.approx(seconds)


def test_one_rank_takes_no_time_and_launching_is_paid_once():
    assert collective_s("all_reduce", 800.0, Group(1, 1, Hop(2, 1), Hop(2, 1), 3.0)) == 0
    paid = Group(8, 1, Hop(2.0, 100.0), Hop(0.0, 1.0), launch_s=3.0)
    assert collective_s("all_gather", 800.0, paid) == pytest.approx(3 + 21)


def cluster_of(node, num_nodes, **fabric):
    return Cluster(name="c", node=load_node(node), num_nodes=num_nodes, source="test", **fabric)


HARDWARE = {
    "switched node": (load_node("h100_sxm_x8"), 8, 8),
    "three of a node": (load_node("a100_80g_x8"), 3, 3),
    "two nodes": (cluster_of("h100_sxm_x8", 2), 16, 8),
    "five nodes": (cluster_of("a100_80g_x8", 5), 40, 8),
    "nodes of one": (cluster_of("h100_sxm_x1", 6), 6, 1),
}


def simulated_s(hardware, ranks, per_node, operation, payload, algorithm):
    network = Network(ExactEnvironment(), Routes(hardware))
    process = Collectives(network, range(ranks), per_node).run(operation, payload, algorithm)
    network.environment.run(network.environment.process(process))
    return network.environment.now


@pytest.mark.parametrize("where", HARDWARE)
@pytest.mark.parametrize(("operation", "algorithm"), CASES)
@pytest.mark.parametrize("payload", [0.0, 4096.0, 1e9])
def test_flows_and_closed_form_agree_on_an_idle_symmetric_network(
    where, operation, algorithm, payload
):
    hardware, ranks, per_node = HARDWARE[where]
    want = collective_s(operation, payload, group_of(hardware, ranks), algorithm)
    got = simulated_s(hardware, ranks, per_node, operation, payload, algorithm)
    assert got == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_an_uneven_all_to_all_takes_no_less_than_its_fullest_port(seed):
    rng = np.random.default_rng(seed)
    hardware, ranks, per_node = HARDWARE["two nodes"]
    sent = rng.exponential(1e8, (ranks, ranks))
    bound = all_to_all_uneven_s(sent, group_of(hardware, ranks))
    network = Network(ExactEnvironment(), Routes(hardware))
    done = Collectives(network, range(ranks), per_node).all_to_all_uneven(sent)
    network.environment.run(done)
    assert bound * (1 - 1e-9) <= network.environment.now <= 2 * bound


def test_an_uneven_all_to_all_of_equal_messages_is_an_even_one():
    for group in (EIGHT, FOUR_BY_TWO):
        even = collective_s("all_to_all", 800.0, group, "direct")
        assert all_to_all_uneven_s(np.full((8, 8), 100.0), group) == pytest.approx(even)


def test_an_oversubscribed_spine_slows_an_all_to_all_but_not_a_ring_along_the_rails():
    def seconds(ratio, operation):
        cluster = cluster_of("h100_sxm_x8", 4, oversubscription=ratio)
        return simulated_s(cluster, 32, 8, operation, 1e9, None)

    assert seconds(4.0, "all_reduce") == pytest.approx(seconds(1.0, "all_reduce"))
    # Of the 24 messages that leave a node, 21 cross the spine: 7/8 of a port at a quarter of it.
    even = seconds(1.0, "all_to_all")
    assert seconds(4.0, "all_to_all") == pytest.approx(even * 4 * 7 / 8, rel=1e-3)


def test_a_slow_link_slows_a_ring_and_closed_forms_do_not_know():
    node = load_node("h100_sxm_x8")
    network = Network(ExactEnvironment(), Routes(node))
    network.set_capacity("gpu3", "gpu_switch", 45e9)
    network.environment.run(
        network.environment.process(Collectives(network, range(8), 8).run("all_reduce", 8e9))
    )
    assert network.environment.now == pytest.approx(14 * (2e-6 + 1e9 / 45e9))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: collective_s("gossip", 1, EIGHT), r"operation='gossip'.*there are: all_reduce"),
        (lambda: collective_s("all_gather", 1, EIGHT, "tree"), r"algorithm='tree'.*are: ring"),
        (lambda: collective_s("all_gather", -1, EIGHT), r"payload_bytes=-1 must be zero or more"),
        (lambda: collective_s("all_gather", float("nan"), EIGHT), r"payload_bytes=nan"),
        (lambda: Group(0, 1, Hop(0, 1), Hop(0, 1)), r"ranks_per_node=0"),
        (lambda: group_of(load_node("h100_sxm_x8"), 9), r"num_ranks=9 on num_nodes=2 must be"),
        (lambda: group_of(HARDWARE["two nodes"][0], 9), r"num_ranks=9 on num_nodes=2 must be"),
        (lambda: all_to_all_uneven_s(np.ones((2, 3)), EIGHT), r"shape \(2, 3\); it must be"),
        (lambda: Collectives(None, range(9), 8), r"9 ranks do not make nodes of ranks_per_node=8"),
        (lambda: Collectives(None, [1, 1], 2), r"name a GPU twice"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
