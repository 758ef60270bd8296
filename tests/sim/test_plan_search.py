"""Plans that place experts: the search against brute force, balance, and what is refused."""

from dataclasses import replace
from itertools import product

import pytest
from expert_cases import GPU, Lines, linear_view, placed
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware_models.parts import load_node
from sim.engine import Engine
from sim.expert_setup import gpu_type, node_limits, prepare_experts, sizes_of
from sim.experts import Experts, PlanCost
from sim.metrics import Slo
from sim.models.architecture import load_architecture
from sim.policies.micro_batching.ping_pong import PingPong
from sim.policies.parallel_plan._largest_batch import (
    Shortfall,
    fitting_tokens,
    iteration_s,
    largest,
    plan_of,
)
from sim.policies.parallel_plan.base import (
    Deployment,
    GpuType,
    ModelSizes,
    Part,
    Plan,
    PlanView,
)
from sim.policies.parallel_plan.disaggregated import Disaggregated
from sim.policies.parallel_plan.expert_parallel import ExpertParallel
from sim.policies.parallel_plan.expert_plan_search import ExpertPlanSearch, balanced_nodes
from sim.policies.parallel_plan.tensor import Tensor
from sim.policies.registry import policies
from sim.processes.stations import StageTimes
from sim.processes.stations import iteration_s as simulated_s
from sim.scenario import Model
from sim.setup import prepare

MACHINES = [f"{gpu}_x8" for gpu in ("l20", "h800_sxm", "a800_80g", "h20", "l40s")]
TINY = ModelSizes(3, 4, 2, 100.0, 300.0, 2.0)
DBRX = ModelSizes(40, 16, 4, 100.0, 20.0, 2.0)


def all_batches(view: PlanView, plan: ExpertPlanSearch) -> list[Plan]:
    """Every deployment with every batch that keeps to memory and SLO, one by one."""
    found: list[Plan] = []
    experts = view.model.num_experts
    for sizes in product(plan.attention_tp, plan.expert_tp, plan.num_attention_nodes):
        for count in plan.num_micro_batches:
            attention, holding = Part("one", sizes[0], sizes[2]), Part("one", sizes[1], experts)
            deployment = Deployment(attention, holding, count)
            if view.model.expert_bytes > sizes[1] * GPU.memory_bytes:
                continue
            tokens = 1
            while (
                view.model.attention_bytes
                + count * tokens * view.context_tokens * view.model.kv_bytes_per_token
                <= sizes[0] * GPU.memory_bytes
                and iteration_s(view, deployment, tokens) <= view.slo_tpot_s
            ):
                found.append(plan_of(view, deployment, tokens, ""))
                tokens += 1
    return found


SECONDS = st.integers(0, 40).map(lambda ticks: ticks / 64)
LINES = st.builds(
    Lines, st.just(TINY), SECONDS.map(lambda s: s + 1 / 64), SECONDS,
    SECONDS.map(lambda s: s + 1 / 64), SECONDS, SECONDS, SECONDS,
)  # fmt: skip
SEARCH = ExpertPlanSearch(
    attention_tp=[1, 2], expert_tp=[1, 2], num_micro_batches=[2, 3, 4],
    num_attention_nodes=[1, 2, 3, 5],
)  # fmt: skip


@settings(max_examples=20)
@given(lines=LINES, slo_s=st.integers(20, 300), context=st.integers(1, 60))
def test_the_search_finds_the_best_of_all_deployments_and_batches(
    lines: Lines, slo_s: int, context: int
) -> None:
    view = linear_view(lines, float(slo_s), context_tokens=float(context))
    every = all_batches(view, SEARCH)
    if not every:
        with pytest.raises(ValueError, match="none of 48 deployments serves a single request"):
            SEARCH.plan(view)
        return
    found = SEARCH.plan(view)
    assert found.tokens_per_s_per_cost == max(one.tokens_per_s_per_cost for one in every)
    assert found._replace(bound="") in every


@settings(max_examples=40)
@given(lines=LINES, slo_s=st.integers(20, 300), context=st.integers(1, 60))
def test_the_batch_is_the_largest_and_its_bound_says_what_one_more_breaks(
    lines: Lines, slo_s: int, context: int
) -> None:
    view = linear_view(lines, float(slo_s), context_tokens=float(context))
    for one in SEARCH.tried(view):
        deployment = one.deployment
        attention, _, count = deployment
        room = attention.tp_size * GPU.memory_bytes - view.model.attention_bytes
        request = count * context * view.model.kv_bytes_per_token
        tokens = one.batch // (count * attention.num_nodes) if isinstance(one, Plan) else 0
        fits = request * (tokens + 1) <= room
        in_time = iteration_s(view, deployment, tokens + 1) <= slo_s
        if isinstance(one, Plan):
            assert one.batch == tokens * count * attention.num_nodes > 0
            assert request * tokens <= room
            assert one.iteration_s == iteration_s(view, deployment, tokens) <= slo_s
            assert fits == (one.bound == "slo")
            assert not (in_time and fits)
        else:
            assert one.bound == ("slo" if fits else "attention memory")
            assert one.times > 1
            assert not (in_time and fits)


@given(lines=LINES, tokens=st.integers(1, 40), count=st.integers(1, 5))
def test_a_plan_expects_of_an_iteration_what_its_simulation_takes(
    lines: Lines, tokens: int, count: int
) -> None:
    """Also where sampling takes longer than a turn of the pipeline, and is not hidden."""
    view = linear_view(lines)
    deployment = Deployment(Part("one", 2, 3), Part("one", 1, 4), count)
    stages, outside_s = lines.stages(deployment, tokens, 1.0), lines.outside_s(deployment, tokens)
    times = StageTimes.alike(*stages, (TINY.num_layers, count), outside_s)
    assert iteration_s(view, deployment, tokens) == simulated_s(times)


@given(most=st.integers(-3, 200), least=st.integers(0, 250))
def test_the_largest_number_is_found_in_any_range(most: int, least: int) -> None:
    assert largest(most, lambda one: one <= least) == max(min(most, least), 0)


@given(
    k1=st.integers(1, 60), k3=st.integers(1, 20), experts=st.sampled_from([4, 8, 16, 60]),
    top_k=st.sampled_from([1, 2, 4]), sizes=st.sampled_from([(1, 1), (1, 2), (2, 1)]),
)  # fmt: skip
def test_balance_is_k1_e_over_k3_k(
    k1: int, k3: int, experts: int, top_k: int, sizes: tuple[int, int]
) -> None:
    model = TINY._replace(num_experts=experts, experts_per_token=top_k)
    view = linear_view(Lines(model, k1 / 1024, 3.0, k3 / 1024, 5.0))
    deployment = Deployment(Part("one", sizes[0], 1), Part("one", sizes[1], experts), 3)
    expected = k1 / sizes[0] * experts / (k3 / sizes[1] * top_k)
    assert abs(balanced_nodes(view, deployment) - max(expected, 1)) <= 0.5 + 1e-9


def test_dbrx_is_balanced_by_8_attention_nodes_and_does_best_with_them() -> None:
    """Figure 15. A consistency check: k1 / k3 = 2 is what makes 8 of n_a = k1 E / (k3 K)."""
    lines = Lines(DBRX, k1=2e-6, k2=1e-6, k3=1e-6, k4=1e-6)
    view = linear_view(lines, 0.15, attention=(GPU._replace(memory_bytes=1e9),))
    sizes = {"attention_tp": [1], "expert_tp": [1], "num_micro_batches": [3]}
    one = Deployment(Part("one", 1, 1), Part("one", 1, 16), 3)
    assert balanced_nodes(view, one) == 8
    assert ExpertPlanSearch(**sizes).plan(view).deployment.attention.num_nodes == 8
    nodes = [1, 2, 4, 8, 16]
    largest_batches = {
        plan.deployment.attention.num_nodes: plan
        for plan in ExpertPlanSearch(**sizes, num_attention_nodes=nodes).tried(view)
        if isinstance(plan, Plan)
    }
    # As in the figure, with the same micro-batch on every attention node however many there are.
    part = one.attention
    same = {
        count: plan_of(view, one._replace(attention=part._replace(num_nodes=count)), 256, "")
        for count in nodes
    }
    for plans in (largest_batches, same):
        per_cost = {count: plan.tokens_per_s_per_cost for count, plan in plans.items()}
        assert per_cost[1] < per_cost[2] < per_cost[4] < per_cost[8] > per_cost[16]
    assert same[4].iteration_s == pytest.approx(same[1].iteration_s, rel=0.01)
    assert same[4].tokens_per_s == pytest.approx(4 * same[1].tokens_per_s, rel=0.01)
    assert same[16].iteration_s > 1.8 * same[8].iteration_s
    stages = same[8].stages
    assert stages.attention_s == pytest.approx(stages.expert_s, rel=0.01)


@pytest.mark.parametrize(
    ("name", "attention_tp", "expert_tp"),
    [("mixtral_8x22b", [1, 2, 4, 8], [1, 2, 4, 8]), ("dbrx", [2, 4], [1, 2]),
     ("scaled_moe", [2, 4], [1, 2])],
)  # fmt: skip
def test_by_the_price_list_h20_is_chosen_for_attention_and_l40s_for_experts(
    name: str, attention_tp: list[int], expert_tp: list[int]
) -> None:
    """Table 3 and section 4.3. Of two models fewer sizes are tried than a search would, for time;
    those that it chooses are among them."""
    machines = Experts(
        attention_nodes=MACHINES, expert_nodes=MACHINES, plan_cost=PlanCost.price,
        context_tokens=650,
    )  # fmt: skip
    search = ExpertPlanSearch(attention_tp=attention_tp, expert_tp=expert_tp)
    scenario = placed(
        search, experts=machines, model=Model(name=name), rules={"micro_batching": PingPong()}
    )
    setup = prepare_experts(scenario, load_architecture(name), 4096)
    attention, experts, count = setup.plan.deployment
    assert experts is not None
    assert (attention.gpu, experts.gpu) == ("h20", "l40s")
    assert count == setup.deployment.num_micro_batches in (3, 4)
    assert setup.plan.iteration_s <= 0.15
    price = setup.total(lambda gpu: gpu.price and gpu.price.relative_to_l20)
    assert price == pytest.approx(setup.plan.cost)
    assert price == pytest.approx(1.85 * attention.num_gpus + 1.08 * experts.num_gpus)


def test_a_plan_serves_as_many_requests_as_its_nodes_have_seats_and_kv_for() -> None:
    setup = prepare(placed())
    assert setup.experts is not None
    plan = setup.experts.plan
    assert setup.limits.max_num_seqs == plan.batch // 2
    pool_tokens = setup.limits.num_blocks * setup.limits.block_size
    node_tokens = plan.batch // 2 * 300
    assert node_tokens <= pool_tokens
    if plan.bound == "memory":
        assert pool_tokens < node_tokens * 1.05


def test_a_model_is_attention_and_experts_and_nothing_else() -> None:
    architecture = load_architecture("mixtral_8x22b")
    setup = prepare_experts(placed(), architecture, 4096)
    sizes = sizes_of(architecture, setup.costs.types)
    assert sizes.expert_bytes == pytest.approx(33.8e9, rel=0.01)
    assert sizes.attention_bytes + 8 * sizes.expert_bytes == pytest.approx(2 * 141e9, rel=0.01)
    assert sizes.kv_bytes_per_token == 229_376
    node = load_node("h20_x8")
    assert node.gpu is not None
    kind = gpu_type(node, architecture, Experts(memory_utilization=0.5))
    assert kind == GpuType("h20", 0.5 * node.gpu.usable_memory_bytes, 1.0, (1, 2, 4, 8))


def test_what_a_plan_costs_may_be_gpus_price_or_watts() -> None:
    plan = Disaggregated(attention_tp=2, num_attention_nodes=2, expert_tp=1, expert_gpu="l40s")
    for kind, cost in (
        (PlanCost.gpus, 4 + 8), (PlanCost.price, 4 * 1.85 + 8 * 1.08),
        (PlanCost.power, 4 * 500 + 8 * 350),
    ):  # fmt: skip
        machines = Experts(expert_nodes=["h20_x8", "l40s_x8"], plan_cost=kind, context_tokens=300)
        setup = prepare(placed(plan, experts=machines))
        assert setup.experts is not None
        assert setup.experts.plan.cost == pytest.approx(cost)


@pytest.mark.parametrize("name", policies("parallel_plan"))
def test_every_plan_is_deterministic_and_changes_nothing(name: str) -> None:
    rule = policies("parallel_plan")[name]()
    view = linear_view(Lines(TINY, 1e-3, 1e-3, 1e-3, 1e-3))
    eight = GPU._replace(tp_sizes=(1, 2, 4, 8))
    view = view._replace(attention=(eight,), experts=(eight,))
    if isinstance(rule, Tensor):
        assert not rule.places_experts
        with pytest.raises(ValueError, match="tensor places no experts"):
            rule.plan(view)
        return
    before = replace(rule)
    assert rule.plan(view) == rule.plan(view)
    assert rule == before


def test_without_an_slo_memory_alone_binds() -> None:
    setup = prepare(placed(slo=Slo()))
    assert setup.experts is not None
    assert setup.experts.plan.bound == "memory"


def test_replicas_beside_attention_leave_less_room_for_kv() -> None:
    plan = ExpertParallel(num_gpus=8, attention_tp=4)
    once, twice = (
        prepare(placed(plan, experts=Experts(context_tokens=300, slots_per_node=slots)))
        for slots in (None, 2)
    )
    assert once.experts is not None
    sizes = sizes_of(once.architecture, once.experts.costs.types)
    block_bytes = 16 * sizes.kv_bytes_per_token
    lost = (once.limits.num_blocks - twice.limits.num_blocks) * block_bytes
    assert lost == pytest.approx(4 * sizes.expert_bytes, abs=2 * block_bytes)


def test_limits_follow_from_the_plan() -> None:
    scenario = placed(engine=Engine(num_blocks=500))
    setup = prepare(scenario)
    assert setup.experts is not None
    limits = node_limits(scenario, setup.experts)
    assert limits == setup.limits
    assert limits.num_blocks == 500


def test_a_shortfall_without_any_room_is_infinitely_short() -> None:
    lack = Shortfall(Deployment(Part("one", 1, 1), None, 1), "slo", 1.0, 0.0)
    assert lack.times == float("inf")
    view = linear_view(Lines(TINY._replace(attention_bytes=1e9), 1.0, 1.0, 1.0, 1.0))
    assert fitting_tokens(view, lack.deployment) < 1
