"""How long iterations of a deployment last: simulated states, what lies between, and loads."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware_models.parts import load_node
from sim.costs.expert_nodes import ElementTypes
from sim.expert_costs import DeploymentCosts
from sim.expert_rows import BatchRow, NodeBatch
from sim.expert_setup import sizes_of
from sim.models.architecture import load_architecture
from sim.policies.expert_balance.base import BalanceView, Placement, checked_placement
from sim.policies.expert_balance.replicate_hot import ReplicateHot
from sim.policies.expert_balance.static import Static
from sim.policies.micro_batching.ping_pong import PingPong
from sim.policies.parallel_plan._largest_batch import iteration_s as planned_s
from sim.policies.parallel_plan.base import Deployment, Part, PlanView
from sim.processes.expert_pace import ExpertLoads, ExpertPace, drawn_rows
from sim.processes.stations import StageTimes, iteration_s
from sim.workload.token_routing.base import TokenRouting
from sim.workload.token_routing.skewed import Skewed
from sim.workload.token_routing.uniform import Uniform

DBRX = load_architecture("dbrx")
NODES = {name: load_node(f"{name}_x8") for name in ("h20", "l40s")}
TYPES = ElementTypes("bf16", 2, 2)
COSTS = DeploymentCosts(DBRX, NODES, TYPES)
IDEAL = DeploymentCosts(DBRX, NODES, TYPES, ideal=True)
APART = Deployment(Part("h20", 2, 3), Part("l40s", 1, 16), 3)
BESIDE = Deployment(Part("h20", 4, 2), None, 1)


class Watched:
    """All that a pace simulated."""

    def __init__(self) -> None:
        self.times: list[tuple[float, StageTimes]] = []

    def __call__(self, now_s: float, times: StageTimes) -> None:
        self.times.append((now_s, times))


def placement(
    routing: TokenRouting, num_nodes: int = 16, slots: int = 1, *, replicate: bool = False
) -> tuple[np.ndarray, Placement]:
    shares = routing.loads(0, DBRX.num_layers, DBRX.num_experts, DBRX.experts_per_token)
    rule = ReplicateHot() if replicate else Static()
    return shares, checked_placement(rule, BalanceView(shares, num_nodes, slots))


def pace_of(
    deployment: Deployment = APART, routing: TokenRouting | None = None, *,
    costs: DeploymentCosts = COSTS, drawn: bool = False, seed: int = 0, **how,
) -> ExpertPace:  # fmt: skip
    nodes = 16 if deployment.experts else deployment.attention.num_gpus
    shares, placed = placement(routing or Uniform(), nodes, 16 // nodes)
    return ExpertPace(costs, deployment, ExpertLoads(shares, placed, drawn, seed), **how)


def batch(contexts: Sequence[int], count: int = 3, chunks: Sequence[tuple] = ()) -> NodeBatch:
    rows = [BatchRow(at, 1, context, True, True) for at, context in enumerate(contexts)]
    rows += [BatchRow(len(rows) + at, tokens, tokens + before, True, False)
             for at, (tokens, before) in enumerate(chunks)]  # fmt: skip
    return NodeBatch(rows, PingPong().split(rows, count))


def alike(tokens: int, context: int, deployment: Deployment = APART) -> list[NodeBatch]:
    """On all nodes and in all micro-batches as many requests with as much context in sum."""
    count = deployment.num_micro_batches
    each = [context // tokens + (at < context % tokens) for at in range(tokens)]
    rows = [BatchRow(at, 1, one, True, True) for at, one in enumerate(each * count)]
    parts = [list(range(at * tokens, (at + 1) * tokens)) for at in range(count)]
    return [NodeBatch(rows, parts)] * deployment.attention.num_nodes


KNOWN = pace_of()


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize(("tokens", "context"), [(1, 1), (7, 1 << 12), (64, 1 << 16)])
def test_a_known_state_lasts_as_long_as_its_simulation(
    drawn: bool, tokens: int, context: int
) -> None:
    watched = Watched()
    known, simulated = (pace_of(drawn=drawn, watch=watch) for watch in (None, watched))
    batches = alike(tokens, context)
    expected_s = simulated.all_nodes_s(0.0, batches)
    for _ in range(2):  # when it is new, and from memory
        assert known.all_nodes_s(0.0, batches) == pytest.approx(expected_s, rel=1e-12)
    assert len(watched.times) == 1


@settings(max_examples=30)
@given(tokens=st.sampled_from([1, 8, 100]), context=st.integers(100, 300_000))
def test_between_known_states_time_is_between_and_near_its_simulation(
    tokens: int, context: int
) -> None:
    simulated = pace_of(watch=lambda now_s, times: None)
    found_s = KNOWN.all_nodes_s(0.0, alike(tokens, context))
    direct_s = simulated.all_nodes_s(0.0, alike(tokens, context))
    assert found_s == pytest.approx(direct_s, rel=0.01)
    low, high = 1 << (context.bit_length() - 1), 1 << context.bit_length()
    ends_s = [KNOWN.all_nodes_s(0.0, alike(tokens, at)) for at in (low, high)]
    # Kernels that cut a long context in more parts may gain a little (see the costs' own test).
    assert ends_s[0] * 0.999 <= found_s <= ends_s[1] * 1.001


@pytest.mark.parametrize("context", [1, 2, 3, 5, 7, 9, 11, 13, 100])
def test_what_grows_by_a_straight_line_is_exact_between_known_states(context: int) -> None:
    """The work at a point of the grid is that of a whole context, and so must its place be."""
    costs = DeploymentCosts(DBRX, NODES, TYPES, ideal=True)
    deployment = Deployment(Part("h20", 1, 1), Part("l40s", 1, 16), 1)
    times = [pace_of(deployment, costs=costs, watch=watch).all_nodes_s(0.0, [batch([context], 1)])
             for watch in (None, lambda now_s, times: None)]  # fmt: skip
    assert times[0] == pytest.approx(times[1], rel=1e-9)


def test_uneven_nodes_take_about_their_simulation_and_no_longer_than_full_ones() -> None:
    uneven = [batch([500] * 30), batch([500] * 9), batch([])]
    found_s = KNOWN.all_nodes_s(0.0, uneven)
    simulated_s = pace_of(watch=lambda now_s, times: None).all_nodes_s(0.0, uneven)
    assert simulated_s == pytest.approx(found_s, rel=0.01)
    assert found_s <= KNOWN.all_nodes_s(0.0, alike(10, 5000))


def test_micro_batches_without_requests_cost_nothing() -> None:
    one = APART._replace(num_micro_batches=1)
    for watch in (None, lambda now_s, times: None):
        several = pace_of(watch=watch).all_nodes_s(0.0, [batch([500]), batch([]), batch([])])
        alone = pace_of(one, watch=watch).all_nodes_s(
            0.0, [batch([500], 1), batch([], 1), batch([], 1)]
        )
        assert several == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize("top_k", [1, 2, 4, 8])
def test_drawn_rows_vary_as_those_of_tokens_that_choose_distinct_experts(top_k: int) -> None:
    experts, tokens = 8, 256
    shares = np.full((1, experts), 1 / experts)
    drawn = np.concatenate(
        [drawn_rows(np.random.default_rng(seed), tokens, top_k, shares) for seed in range(4000)]
    )
    assert drawn.sum(axis=1) == pytest.approx(tokens * top_k)
    assert drawn.max() <= tokens * (1 + 1e-9)
    chance = top_k / experts
    assert drawn.mean(axis=0) == pytest.approx(tokens * chance, rel=0.01)
    wanted = tokens * chance * (1 - chance)
    assert drawn.var(axis=0).mean() == pytest.approx(wanted, rel=0.03, abs=1e-9)


@pytest.mark.parametrize("deployment", [APART, BESIDE], ids=["apart", "beside"])
@pytest.mark.parametrize("costs", [COSTS, IDEAL], ids=["kernels", "ideal"])
@pytest.mark.parametrize("tokens", [4, 128])
def test_an_even_iteration_takes_what_the_plan_expects(
    deployment: Deployment, costs: DeploymentCosts, tokens: int
) -> None:
    view = PlanView(sizes_of(DBRX, TYPES), (), (), 512.0, float("inf"), costs)
    expected_s = planned_s(view, deployment, tokens)
    batches = alike(tokens, tokens * 512, deployment)
    found_s = pace_of(deployment, costs=costs).all_nodes_s(0.0, batches)
    assert found_s == pytest.approx(expected_s, rel=1e-9)
    later_s = pace_of(deployment, costs=costs, overhead_s=0.25).all_nodes_s(2.0, batches)
    assert later_s == pytest.approx(2.25 + expected_s, rel=1e-9)


@settings(max_examples=25)
@given(data=st.data())
def test_who_watches_sees_the_times_of_every_iteration(data: st.DataObject) -> None:
    watched = Watched()
    pace = pace_of(watch=watched, overhead_s=0.125, drawn=data.draw(st.booleans()))
    contexts = st.lists(st.integers(1, 900), max_size=12)
    chunks = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 50)), max_size=2)
    for number in range(3):
        batches = [batch(data.draw(contexts), 3, data.draw(chunks)) for _ in range(3)]
        if not any(one.rows for one in batches):
            continue
        end_s = pace.all_nodes_s(float(number), batches)
        now_s, times = watched.times[-1]
        assert now_s == number
        assert end_s == now_s + 0.125 + iteration_s(times)
        filled = [at for at in range(3) if any(one.parts[at] for one in batches)]
        assert times.attention_s.shape == times.expert_s.shape == (DBRX.num_layers, len(filled))
        assert times.dispatch_s is times.combine_s
        node = COSTS.attention_node(("h20", 2), True)
        for column, at in enumerate(filled):
            shapes = [one.shapes()[at] for one in batches]
            assert (times.attention_s[:, column] == max(map(node.layer_s, shapes))).all()
            assert (times.expert_s[:, column] > 0).all()
            assert (times.dispatch_s[:, column] > 0).all()


def test_prompts_that_come_with_their_kv_are_one_more_token() -> None:
    elsewhere = pace_of(prefill_here=False)
    prompts = [batch([], 3, [(300, 0), (200, 100), (300, 0)])] * 3
    assert elsewhere.all_nodes_s(0.0, prompts) == KNOWN.all_nodes_s(0.0, alike(1, 300))
    assert KNOWN.all_nodes_s(0.0, prompts) > 1.05 * elsewhere.all_nodes_s(0.0, prompts)


class Logged(DeploymentCosts):
    """Notes the rows that it is asked about."""

    def __init__(self) -> None:
        super().__init__(DBRX, NODES, TYPES)
        self.rows: list[np.ndarray] = []

    def loaded_s(self, deployment, rows, most_tokens, tokens):
        self.rows.append(rows)
        return super().loaded_s(deployment, rows, most_tokens, tokens)


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("replicate", [False, True])
def test_every_choice_goes_to_one_replica_of_its_expert(drawn: bool, replicate: bool) -> None:
    costs = Logged()
    shares, placed = placement(Skewed(skew=1.2), 16, 2 if replicate else 1, replicate=replicate)
    pace = ExpertPace(costs, APART, ExpertLoads(shares, placed, drawn))
    pace.all_nodes_s(0.0, [batch([100] * 30)] * 3)
    assert len(costs.rows) % 3 == 0
    for rows in costs.rows:
        assert rows.sum(axis=1) == pytest.approx([30 * DBRX.experts_per_token] * DBRX.num_layers)
        for layer, held in enumerate(placed.physical_to_logical):
            by_expert = np.bincount(held, rows[layer], minlength=DBRX.num_experts)
            if not drawn:
                assert by_expert == pytest.approx(30 * DBRX.experts_per_token * shares[layer])
            copies = np.bincount(held, minlength=DBRX.num_experts)
            assert rows[layer] == pytest.approx((by_expert / copies)[held])


def test_drawn_loads_are_never_faster_than_even_ones_and_differ_by_seed_and_micro_batch() -> None:
    batches = alike(48, 48 * 512)
    even_s = KNOWN.all_nodes_s(0.0, batches)
    drawn_s = [pace_of(drawn=True, seed=seed).all_nodes_s(0.0, batches) for seed in range(8)]
    assert min(drawn_s) > even_s
    assert len(set(drawn_s)) == 8
    again_s = [pace_of(drawn=True, seed=seed).all_nodes_s(0.0, batches) for seed in range(8)]
    assert again_s == drawn_s
    costs = Logged()
    pace_of(costs=costs, drawn=True).all_nodes_s(0.0, batches)
    first, second, third = costs.rows[:3]
    assert (first != second).any()
    assert (second != third).any()
    assert (first[0] != first[1]).any()


def test_the_mean_of_drawn_loads_is_what_is_expected() -> None:
    costs, routing = Logged(), Skewed(skew=1.0)
    for seed in range(60):
        pace = pace_of(costs=costs, routing=routing, drawn=True, seed=seed, watch=lambda *_: None)
        pace.all_nodes_s(0.0, alike(50, 5000))
    shares, placed = placement(routing)
    rows = 150 * DBRX.experts_per_token
    expected = np.take_along_axis(rows * shares, placed.physical_to_logical, axis=1)
    mean = np.mean(costs.rows, axis=0)
    # 180 draws: five standard deviations of a mean.
    slack = 5 * np.sqrt(expected / 180)
    assert (np.abs(mean - expected) <= slack).all()


def test_replicas_of_hot_experts_save_time_under_skewed_loads() -> None:
    batches = alike(512, 512 * 512)
    times: list[float] = []
    for slots, replicate in ((1, False), (2, True)):
        shares, placed = placement(Skewed(skew=2.0), 16, slots, replicate=replicate)
        pace = ExpertPace(COSTS, APART, ExpertLoads(shares, placed, False))
        times.append(pace.all_nodes_s(0.0, batches))
    assert times[1] < 0.9 * times[0]
