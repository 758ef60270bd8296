"""Costs of attention nodes, expert nodes and what is sent between: closed forms and flows."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware_models.parts import load_node
from hardware_models.schema import Cluster, Node
from sim.costs.alpha_beta import Hop
from sim.costs.expert_exchange import exchange_s, node_port
from sim.costs.expert_nodes import AttentionNode, ElementTypes, ExpertNode, Reach, one_layer
from sim.costs.link_collectives import LinkCollectives
from sim.expert_costs import DeploymentCosts, decodes
from sim.models.architecture import load_architecture
from sim.models.operators import layer_linears
from sim.models.parameters import parameter_counts
from sim.models.work import IterationShape
from sim.policies.parallel_plan.base import Deployment, Part
from sim.processes.exact_time import ExactEnvironment
from sim.processes.network import Network
from sim.state.two_kinds import TwoKinds

TYPES = ElementTypes("bf16", 2, 2)
MIXTRAL, DBRX = load_architecture("mixtral_8x22b"), load_architecture("dbrx")
NODES = {name: load_node(f"{name}_x8") for name in ("h20", "l40s", "a800_80g")}
COSTS = DeploymentCosts(DBRX, NODES, TYPES)
BOTH = pytest.mark.parametrize("ideal", [True, False])
SIZES = pytest.mark.parametrize("tp_size", [1, 2, 8])


def apart(nodes: int = 4, tp: int = 2, expert_tp: int = 1, expert_nodes: int = 16) -> Deployment:
    return Deployment(Part("h20", tp, nodes), Part("l40s", expert_tp, expert_nodes), 3)


def peaks(node: Node) -> tuple[float, float]:
    assert node.gpu is not None
    peak = node.gpu.peak
    return peak.flops_per_s["bf16"], peak.memory_bandwidth_bytes_per_s


def roofline_s(node: Node, rows: float, inputs: float, outputs: float, groups: int = 1) -> float:
    """A product of so many rows in all, in so many groups with weights of their own."""
    flops_per_s, bytes_per_s = peaks(node)
    moved = 2 * (groups * inputs * outputs + rows * (inputs + outputs))
    return max(2 * rows * inputs * outputs / flops_per_s, moved / bytes_per_s)


@SIZES
@pytest.mark.parametrize("name", ["h20", "l40s"])
def test_an_ideal_expert_takes_its_flops_or_its_weights(name: str, tp_size: int) -> None:
    node, a = NODES[name], MIXTRAL
    expert = ExpertNode(a, node, tp_size, TYPES, Reach(ideal=True))
    flops_per_s, bytes_per_s = peaks(node)
    h, width = a.hidden_size, a.moe_intermediate_size / tp_size
    many = 4096
    assert expert.layer_s([many]) == pytest.approx(2 * 3 * many * h * width / flops_per_s)
    weights = 3 * h * width * TYPES.dtype_bytes
    moved = weights + TYPES.dtype_bytes * (2 * h + 3 * width)  # one row in, its gate, and out
    assert expert.layer_s([1]) == pytest.approx(moved / bytes_per_s)
    assert expert.layer_s([1]) == pytest.approx(weights / bytes_per_s, rel=0.002)


@given(rows=st.lists(st.integers(0, 900), min_size=1, max_size=5))
def test_an_ideal_node_of_several_experts_reads_those_that_are_hit(rows: list[int]) -> None:
    node, a = NODES["l40s"], MIXTRAL
    seconds = ExpertNode(a, node, 4, TYPES, Reach(ideal=True)).layer_s(rows)
    total, hit, width = sum(rows), sum(map(bool, rows)), a.moe_intermediate_size // 4
    into_s = roofline_s(node, total, a.hidden_size, 2 * width, hit) if total else 0.0
    out_s = roofline_s(node, total, width, a.hidden_size, hit) if total else 0.0
    assert seconds == pytest.approx(into_s + out_s)


@SIZES
@given(tokens=st.integers(1, 600), context=st.integers(1, 4000))
def test_ideal_attention_is_four_products_and_reading_kv(
    tp_size: int, tokens: int, context: int
) -> None:
    node, a = NODES["h20"], DBRX
    seconds = AttentionNode(a, node, tp_size, TYPES, Reach(ideal=True)).layer_s(
        decodes(tokens, tokens * context)
    )
    query, kv = a.query_size / tp_size, a.kv_size / tp_size
    flops_per_s, bytes_per_s = peaks(node)
    # The score of a pair and its share of the sum, for every query head.
    flops = 4 * tokens * context * query
    moved = 2 * tokens * (2 * kv * context + (query + 2 * kv) + query + 2 * kv)
    expected_s = (
        roofline_s(node, tokens, a.hidden_size, query + 2 * kv)
        + max(flops / flops_per_s, moved / bytes_per_s)
        + roofline_s(node, tokens, query, a.hidden_size)
        + roofline_s(node, tokens, a.hidden_size, a.num_experts)
    )
    assert seconds == pytest.approx(expected_s)


@BOTH
def test_each_token_of_context_costs_its_kv_over_the_bandwidth(ideal: bool) -> None:
    node = NODES["h20"]
    attention = AttentionNode(DBRX, node, 4, TYPES, Reach(ideal=ideal))
    times = [attention.layer_s(decodes(256, 256 * context)) for context in (1000, 2000)]
    kv_bytes = 256 * 1000 * 2 * DBRX.kv_size * TYPES.kv_dtype_bytes / 4
    least_s = kv_bytes / peaks(node)[1]
    assert times[1] - times[0] == pytest.approx(least_s if ideal else least_s / 0.85)


def test_prompts_are_costed_as_one_launch_with_the_decodes_beside_them() -> None:
    attention = AttentionNode(DBRX, NODES["h20"], 4, TYPES)
    shape = IterationShape.of([(300, 0)], [500] * 8, 9)
    prompt_s = attention.layer_s(IterationShape.of([(300, 0)], [], 1))
    assert prompt_s < attention.layer_s(shape) < prompt_s + attention.layer_s(decodes(8, 4000))


@SIZES
@given(tokens=st.integers(1, 3000), context=st.integers(1, 5000))
def test_exchanges_behind_products_never_take_longer_than_before_and_after_them(
    tp_size: int, tokens: int, context: int
) -> None:
    shape = decodes(tokens, tokens * context)
    for kind, work in ((AttentionNode, shape), (ExpertNode, [tokens, tokens // 2])):
        fused, plain = (
            kind(DBRX, NODES["h20"], tp_size, TYPES, Reach(fused=fused)).layer_s(work)  # pyright: ignore[reportArgumentType]
            for fused in (True, False)
        )
        assert (fused == plain) if tp_size == 1 else (fused < plain)


@BOTH
@SIZES
def test_nothing_gets_faster_with_more_rows_or_more_context(ideal: bool, tp_size: int) -> None:
    node, reach = NODES["a800_80g"], Reach(ideal=ideal)
    attention = AttentionNode(DBRX, node, tp_size, TYPES, reach)
    expert = ExpertNode(DBRX, node, tp_size, TYPES, reach)
    counts = range(1, 700)
    for times in (
        [expert.layer_s([count]) for count in counts],
        [expert.layer_s([count] * 4) for count in counts],
        [attention.layer_s(decodes(count, 650 * count)) for count in counts],
        [attention.outside_s(count, count) for count in counts],
    ):
        assert (np.diff(times) >= -1e-12 * np.array(times[1:])).all()
    contexts = range(50, 200_000, 499)
    times = [attention.layer_s(decodes(50, context)) for context in contexts]
    # Real kernels cut a context where that keeps more SMs busy, and gain a little by it.
    slack = 1e-12 if ideal else 1e-3
    assert (np.diff(times) >= -slack * np.array(times[1:])).all()


def test_without_work_nothing_takes_time() -> None:
    attention = AttentionNode(DBRX, NODES["h20"], 2, TYPES)
    expert = ExpertNode(DBRX, NODES["h20"], 2, TYPES)
    assert attention.layer_s(decodes(0, 0)) == attention.outside_s(0, 0) == 0
    assert attention.outside_s(300, 0) == 0  # chunks in mid-prompt sample nothing
    assert expert.layer_s([]) == expert.layer_s([0, 0]) == 0
    assert COSTS.exchange_s(apart(), np.zeros((4, 16))) == 0
    seconds = COSTS.loaded_s(apart(), np.zeros((2, 16)), 0, 0)
    assert not np.concatenate(seconds).any()


def test_one_layer_has_the_parameters_of_one() -> None:
    single, whole = one_layer(MIXTRAL), MIXTRAL
    for linear in layer_linears(single):
        assert linear.layers == 1
    routed = ("expert_gate_up", "expert_down", "qkv_projection", "output_projection", "router")
    for name in routed:
        assert parameter_counts(single)[name] * whole.num_layers == parameter_counts(whole)[name]


def flowed_s(sent: np.ndarray, senders: Hop, receivers: Hop) -> float:
    """The same bytes as flows that share ports by max-min fairness."""
    environment = ExactEnvironment()
    latency_s = (senders.latency_s + receivers.latency_s) / 2
    wiring = TwoKinds(sent.shape, (senders.bytes_per_s, receivers.bytes_per_s), latency_s)
    source, destination = np.nonzero(sent)
    if not len(source):
        return 0.0
    network = Network(environment, wiring)
    done = network.transfer_all(source, destination + sent.shape[0], sent[source, destination])
    environment.run(until=done)
    return environment.now


PORTS = st.builds(Hop, st.sampled_from([0.0, 3e-6]), st.sampled_from([1e9, 2.5e10, 7e10]))
COUNTS = st.tuples(st.integers(1, 6), st.integers(1, 6))


@given(counts=COUNTS, each=st.integers(1, 10**7), senders=PORTS, receivers=PORTS)
def test_an_even_exchange_takes_what_its_flows_take(
    counts: tuple[int, int], each: int, senders: Hop, receivers: Hop
) -> None:
    sent = np.full(counts, float(each))
    flows_s = flowed_s(sent, senders, receivers)
    assert exchange_s(sent, senders, receivers) == pytest.approx(flows_s, rel=1e-9)


@given(data=st.data(), counts=COUNTS, senders=PORTS, receivers=PORTS)
def test_an_uneven_exchange_takes_at_least_the_closed_form(
    data: st.DataObject, counts: tuple[int, int], senders: Hop, receivers: Hop
) -> None:
    size = counts[0] * counts[1]
    flat = data.draw(st.lists(st.integers(0, 10**6), min_size=size, max_size=size))
    sent = np.array(flat, np.float64).reshape(counts)
    bound_s = exchange_s(sent, senders, receivers)
    assert flowed_s(sent, senders, receivers) >= bound_s * (1 - 1e-9)
    back_s = exchange_s(sent.T, receivers, senders)
    assert back_s == pytest.approx(bound_s)  # and so long back again


def test_the_bound_of_an_uneven_exchange_may_be_missed() -> None:
    """The third sender gets a third of either port until the others are done, and wastes a third
    of its own."""
    sent = np.array([[1.0, 0.0], [1.0, 0.0], [3.0, 3.0], [0.0, 1.0], [0.0, 1.0]])
    port = Hop(0.0, 1.0)
    assert exchange_s(sent, port, port) == 6.0
    assert flowed_s(sent, port, port) == pytest.approx(7.0)


@pytest.mark.parametrize(("tp", "expert_tp"), [(1, 1), (2, 1), (8, 2), (4, 8)])
@pytest.mark.parametrize("nodes", [1, 4, 9])
def test_a_transfer_takes_equation_6(tp: int, expert_tp: int, nodes: int) -> None:
    deployment, tokens = apart(nodes, tp, expert_tp), 128
    per_gpu = {"h20": 4 * 50e9 / 8, "l40s": 2 * 50e9 / 8}
    h, top_k, size = DBRX.hidden_size, DBRX.experts_per_token, TYPES.dtype_bytes
    rows = tokens * nodes * top_k / DBRX.num_experts
    sending_s = tokens * h * top_k * size / tp / per_gpu["h20"]
    receiving_s = rows * h * size / expert_tp / per_gpu["l40s"]
    latency_s = NODES["h20"].nic_link.latency_s  # pyright: ignore[reportOptionalMemberAccess]
    stages = COSTS.stages(deployment, tokens, 650)
    assert stages.transfer_s == pytest.approx(latency_s + max(sending_s, receiving_s))


def test_a_pair_exchanges_as_much_as_the_papers_typical_message() -> None:
    """Section 5: Mixtral, 128 tokens on an attention node of 2 GPUs: 196,608 bytes a GPU."""
    costs = DeploymentCosts(MIXTRAL, NODES, TYPES)
    pair = 128 * MIXTRAL.experts_per_token / MIXTRAL.num_experts * costs.token_bytes
    assert pair / 2 == 196_608


def test_ports_are_those_of_the_gpus_in_use_and_no_faster_than_their_way_to_the_host() -> None:
    node = NODES["h20"]
    assert node.nic_link is not None
    assert node_port(node, 2) == Hop(node.nic_link.latency_s, 2 * 4 * 50e9 / 8)
    fast = replace(node, num_nics=100)
    assert fast.host_link is not None
    assert node_port(fast, 2).bytes_per_s == 2 * fast.host_link.bandwidth_bytes_per_s
    for broken in (replace(node, num_nics=0, nic_link=None), replace(node, num_gpus=1)):
        with pytest.raises(ValueError, match="take a node with ports and as many GPUs"):
            node_port(broken, 2)


@BOTH
@pytest.mark.parametrize("expert_nodes", [16, 8, 2])
def test_even_loads_cost_what_the_plan_expects_of_them(ideal: bool, expert_nodes: int) -> None:
    costs = DeploymentCosts(DBRX, NODES, TYPES, ideal=ideal)
    deployment, tokens = apart(5, 2, 2, expert_nodes), 120
    rows = np.full((3, 16), 5 * tokens * DBRX.experts_per_token / 16)
    expert_s, way_s = costs.loaded_s(deployment, rows, tokens, 5 * tokens)
    stages = costs.stages(deployment, tokens, 650)
    assert expert_s == pytest.approx([stages.expert_s] * 3)
    assert way_s == pytest.approx([stages.transfer_s] * 3)


@pytest.mark.parametrize("num_gpus", [2, 8, 16, 32, 64])
def test_even_loads_cost_as_much_where_experts_lie_with_attention(num_gpus: int) -> None:
    deployment = Deployment(Part("a800_80g", 2, num_gpus // 2), None, 1)
    nodes, tokens = num_gpus // 2, 96
    rows = np.full((3, 16), nodes * tokens * DBRX.experts_per_token / 16)
    expert_s, way_s = COSTS.loaded_s(deployment, rows, tokens, nodes * tokens)
    stages = COSTS.stages(deployment, tokens, 650)
    assert expert_s == pytest.approx([stages.expert_s] * 3)
    assert way_s == pytest.approx([stages.transfer_s] * 3)


@pytest.mark.parametrize(("num_gpus", "machines"), [(4, 1), (8, 1), (32, 4)])
def test_experts_beside_attention_are_reached_by_all_to_all(num_gpus: int, machines: int) -> None:
    deployment = Deployment(Part("a800_80g", 4, num_gpus // 4), None, 1)
    node, tokens = NODES["a800_80g"], 256
    payload = tokens * DBRX.experts_per_token * DBRX.hidden_size * 2 / 4
    hardware = node
    if machines > 1:
        hardware = Cluster(name="several", node=node, num_nodes=machines, source="made up")
    direct = LinkCollectives(hardware).seconds("all_to_all", num_gpus, payload, machines)
    assert COSTS.stages(deployment, tokens, 650).transfer_s == pytest.approx(direct.seconds)


@given(data=st.data(), slots=st.sampled_from([16, 32]))
def test_the_slowest_node_and_the_fullest_port_decide(data: st.DataObject, slots: int) -> None:
    flat = data.draw(st.lists(st.integers(0, 500), min_size=2 * slots, max_size=2 * slots))
    rows = np.array(flat, np.float64).reshape(2, slots)
    deployment, tokens = apart(4, 2, 1, 16), 200
    expert_s, way_s = COSTS.loaded_s(deployment, rows, tokens, 4 * tokens)
    node = COSTS.expert_node(("l40s", 1), True)
    senders, receivers = COSTS.ports(deployment)
    for layer in range(2):
        parts = rows[layer].reshape(16, -1)
        # A node's experts are launched together, each with the mean of those that are hit.
        hit = (parts > 0).sum(axis=1).tolist()
        each = [node.layer_s([part.sum() / max(count, 1)] * count)
                for part, count in zip(parts, hit, strict=True)]  # fmt: skip
        assert expert_s[layer] == pytest.approx(max(each))
        sent = np.zeros((4, 16))
        sent[0] = tokens * DBRX.experts_per_token * COSTS.token_bytes / 16
        received = np.zeros((4, 16))
        received[0, 0] = parts.sum(axis=1).max() * COSTS.token_bytes
        latency_s = (senders.latency_s + receivers.latency_s) / 2
        ways_s = (exchange_s(sent, senders, Hop(receivers.latency_s, np.inf)),
                  exchange_s(received, Hop(senders.latency_s, np.inf), receivers))  # fmt: skip
        assert way_s[layer] == pytest.approx(max(*ways_s, latency_s))


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("llama_3_8b", "32 layers without experts"), ("qwen1_5_1_8b", "layers without experts")],
)
def test_models_without_experts_in_every_layer_are_refused(name: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        AttentionNode(load_architecture(name), NODES["h20"], 1, TYPES)


def test_an_expert_that_every_token_takes_has_no_place() -> None:
    shared = replace(MIXTRAL, shared_expert_intermediate_size=4096)
    with pytest.raises(ValueError, match=r"shared_expert_intermediate_size=4096.*without"):
        ExpertNode(shared, NODES["h20"], 1, TYPES)


def test_a_machine_without_gpus_holds_nothing() -> None:
    bare = replace(NODES["h20"], gpu=None, num_gpus=0)
    with pytest.raises(ValueError, match="has no GPU"):
        ExpertNode(MIXTRAL, bare, 1, TYPES)
