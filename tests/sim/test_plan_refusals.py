"""What a plan that places experts refuses: the value, the rule, by how much, and the way out."""

from dataclasses import replace

import pytest
from expert_cases import placed

from sim.api import check
from sim.engine import Engine
from sim.experts import Experts, PlanCost
from sim.faults import Fault, Kind
from sim.faults import Part as Broken
from sim.metrics import Slo
from sim.policies.instance_plan.prefill_decode import PrefillDecode
from sim.policies.micro_batching.ping_pong import PingPong
from sim.policies.parallel_plan.base import ParallelPlan
from sim.policies.parallel_plan.disaggregated import Disaggregated
from sim.policies.parallel_plan.expert_parallel import ExpertParallel
from sim.policies.parallel_plan.expert_plan_search import ExpertPlanSearch
from sim.scenario import CostFamily, Model
from sim.setup import prepare
from sim.workload.retrieval import Retrieval

SLOW = Fault(part=Broken.gpu, kind=Kind.slow, factor=2.0, at_s=1.0)


def refusal(plan: ParallelPlan, **fields) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the tests look into it
        prepare(placed(plan, **fields))
    return str(caught.value)


def test_weights_that_do_not_fit_say_which_and_by_how_much() -> None:
    """Mixtral without its experts has 5 billion weights; an expert has 16.9 billion."""
    low = {"experts": Experts(attention_nodes=["rtx_4090_x8"], expert_nodes=["h20_x8"],
                              memory_utilization=0.4, context_tokens=300)}  # fmt: skip
    text = refusal(Disaggregated(attention_tp=1, expert_tp=1), **low)
    assert "1 x 1 rtx_4090 for attention, 8 x 1 h20 for experts, 3 micro-batches" in text
    assert "attention memory binds first" in text
    assert "GiB are needed and" in text
    assert " times)" in text
    small = {"experts": Experts(expert_nodes=["rtx_4090_x8"], context_tokens=300)}
    text = refusal(Disaggregated(attention_tp=2, expert_tp=1), **small)
    assert "expert memory binds first, 31.5 GiB are needed" in text
    text = refusal(Disaggregated(attention_tp=2, expert_tp=2, num_expert_nodes=2), **small)
    assert "expert memory binds first, 126 GiB are needed" in text
    text = refusal(ExpertParallel(num_gpus=2, attention_tp=2))
    assert "attention memory binds first" in text
    assert "2.. times)" not in text


def test_an_slo_that_no_plan_meets_says_by_how_much() -> None:
    text = refusal(ExpertPlanSearch(), slo=Slo(tpot_s=0.01))
    nearest = "slo binds first"
    assert nearest in text
    assert "ms a token are needed and 10 allowed" in text
    assert "allow other GPUs or sizes, or a longer slo.tpot_s" in text


@pytest.mark.parametrize(
    ("plan", "complaint"),
    [
        (Disaggregated(num_expert_nodes=3), r"num_expert_nodes=3 must divide num_experts=8"),
        (Disaggregated(attention_tp=3), r"policy.parallel_plan.attention_tp=3 must be one of 1, 2"),
        (Disaggregated(expert_tp=16), r"policy.parallel_plan.expert_tp=16 must be one of 1, 2"),
        (Disaggregated(attention_gpu="b200"), r"policy.parallel_plan.attention_gpu=b200 is none "
                                              r"of the GPUs to choose from: h20; name one"),
        (Disaggregated(expert_gpu="l40s"), r"policy.parallel_plan.expert_gpu=l40s is none of"),
        (ExpertParallel(gpu="l40s"), r"policy.parallel_plan.gpu=l40s is none of"),
        (ExpertParallel(num_gpus=12, attention_tp=4), r"num_gpus=12 must divide num_experts=8"),
        (ExpertParallel(num_gpus=16, attention_tp=16), r"attention_tp=16 must be one of 1, 2, 4"),
        (ExpertPlanSearch(attention_tp=[3]), r"must name a size into which the model"),
    ],
)  # fmt: skip
def test_plans_that_do_not_divide_or_are_not_known_are_refused(
    plan: ParallelPlan, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        prepare(placed(plan))


@pytest.mark.parametrize(
    ("rule", "fields", "complaint"),
    [
        (Disaggregated, {"attention_tp": 0}, "attention_tp=0 must be at least 1"),
        (Disaggregated, {"num_expert_nodes": 0}, "num_expert_nodes=0 must be at least 1, or null"),
        (ExpertParallel, {"num_gpus": 0}, "num_gpus=0 must be at least 1"),
        (ExpertParallel, {"num_gpus": 6, "attention_tp": 4}, "num_gpus=6 must be a multiple of"),
        (ExpertPlanSearch, {"expert_tp": []}, "must name numbers of at least 1"),
        (ExpertPlanSearch, {"num_micro_batches": [0]}, "must name numbers of at least 1"),
        (ExpertPlanSearch, {"num_attention_nodes": [0]}, "must be at least 1 each, or empty"),
        (ExpertPlanSearch, {"most_attention_nodes": 0}, "most_attention_nodes=0 must be at least"),
        (Experts, {"memory_utilization": 0.0}, r"memory_utilization=0.0 must be in \(0, 1\]"),
        (Experts, {"context_tokens": 0.5}, "context_tokens=0.5 must be at least 1"),
        (Experts, {"slots_per_node": 0}, "slots_per_node=0 must be at least 1"),
        (Experts, {"expert_nodes": ["h20_x8"] * 2}, "names a node twice"),
    ],
)
def test_settings_out_of_range_are_refused(rule: type, fields: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        rule(**fields)


@pytest.mark.parametrize(
    ("fields", "instead"),
    [
        ({"cost": CostFamily.fitted}, "cost=fitted; take cost=roofline or profiled"),
        ({"cost": CostFamily.profiled, "cost_tables": "x"}, "take cost_tables=null"),
        ({"num_replicas": 2}, "num_replicas=2; take num_replicas=1"),
        ({"tp_size": 2}, "tp_size=2; take tp_size=1"),
        ({"pp_size": 2}, "pp_size=2; take pp_size=1"),
        ({"rules": {"instance_plan": PrefillDecode()}}, "take policy/instance_plan=colocated"),
        ({"faults": [SLOW]}, r"faults=\[\]"),
        ({"engine": Engine(schedules_ahead=True)}, "take engine.schedules_ahead=false"),
        ({"engine": Engine(prefix_caching=True)}, "take engine.prefix_caching=false"),
        ({"workload": Retrieval(rate_per_s=1.0, num_requests=5)}, "take another workload"),
    ],
)
def test_what_such_plans_are_not_combined_with_is_refused(fields: dict, instead: str) -> None:
    with pytest.raises(ValueError, match=f"places experts and is not combined with .*{instead}"):
        check(placed(**fields))


def test_a_model_without_experts_in_every_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="llama_3_8b has 32 layers without experts"):
        check(placed(model=Model(name="llama_3_8b")))


def test_micro_batches_need_experts_apart() -> None:
    plan = ExpertParallel(num_gpus=8, attention_tp=4)
    rules = {"micro_batching": PingPong(num_micro_batches=3)}
    with pytest.raises(ValueError, match=r"asks for 3 micro-batches, .*nothing overlaps"):
        check(placed(plan, rules=rules))
    assert check(placed(plan, rules={"micro_batching": PingPong()})).experts is not None


def test_a_kind_of_gpu_lies_in_machines_of_one_kind() -> None:
    machines = Experts(attention_nodes=["h20_x8"], expert_nodes=["h20_x4"], context_tokens=300)
    with pytest.raises(ValueError, match=r"h20_x8 and h20_x4 .* the same GPU h20.*take one of"):
        check(placed(experts=machines))


def test_more_kv_blocks_than_a_node_has_room_for_are_refused() -> None:
    engine = Engine(num_blocks=10**6)
    with pytest.raises(ValueError, match=r"num_blocks=1000000 .* 2 h20, which has room for \d+"):
        check(placed(engine=engine))
    assert check(placed(engine=Engine(num_blocks=100))).limits.num_blocks == 100


def test_replicas_of_experts_take_memory() -> None:
    """An L40S has room for one expert of Mixtral and no more."""
    plan = Disaggregated(attention_tp=2, num_attention_nodes=2, expert_tp=1)
    one = Experts(expert_nodes=["l40s_x8"], context_tokens=300, slots_per_node=1)
    assert check(placed(plan, experts=one)).experts is not None
    two = replace(one, slots_per_node=2)
    with pytest.raises(
        ValueError, match=r"slots_per_node=2 takes 63 GiB .* each l40s, .* fill [\d.]+; lower it"
    ):
        check(placed(plan, experts=two))
    plan = ExpertParallel(num_gpus=8, attention_tp=4)
    with pytest.raises(ValueError, match=r"slots_per_node=3 takes [\d.]+ GiB .* on each h20"):
        check(placed(plan, experts=Experts(context_tokens=300, slots_per_node=3)))


def test_a_gpu_whose_price_is_not_known_has_no_place_in_a_plan_by_price() -> None:
    machines = Experts(attention_nodes=["rtx_pro_6000_x8"], plan_cost=PlanCost.price)
    with pytest.raises(ValueError, match=r"plan_cost=price is not known of .*take another GPU"):
        prepare(placed(experts=machines))


@pytest.mark.parametrize("key", ["attention_tp", "expert_tp"])
def test_sizes_into_which_nothing_divides_are_refused_with_those_that_do(key: str) -> None:
    with pytest.raises(ValueError, match=rf"{key}=\[3\] must name a size .* there are: 1, 2, 4, 8"):
        prepare(placed(ExpertPlanSearch(**{key: [3]})))
