"""Scenarios whose plans place experts, through the plain Python door."""

from functools import cache

import numpy as np
import pytest
from expert_cases import placed
from serving_cases import assert_equal_traces

from sim.api import check, run
from sim.engine import Engine
from sim.experts import Experts, Loads
from sim.metrics import Slo
from sim.models.flops import attention_flops_per_pair, layer_flops_per_token
from sim.models.operators import lm_head
from sim.policies.batching.chunked_prefill import ChunkedPrefill
from sim.policies.expert_balance.replicate_hot import ReplicateHot
from sim.policies.micro_batching.ping_pong import PingPong
from sim.policies.parallel_plan.base import Deployment, Part
from sim.policies.parallel_plan.disaggregated import Disaggregated
from sim.policies.parallel_plan.expert_parallel import ExpertParallel
from sim.policies.parallel_plan.expert_plan_search import ExpertPlanSearch
from sim.policies.parallel_plan.tensor import Tensor
from sim.policies.routing.least_loaded import LeastLoaded
from sim.result import Result
from sim.scenario import Model, Policies
from sim.workload.poisson import Poisson
from sim.workload.token_routing.skewed import Skewed

TWO = Disaggregated(attention_tp=2, num_attention_nodes=2, expert_tp=2)
PLANS = {
    "disaggregated": TWO,
    "expert_parallel": ExpertParallel(num_gpus=8, attention_tp=4),
    "more_gpus_than_experts": ExpertParallel(num_gpus=16, attention_tp=4),
    "expert_plan_search": ExpertPlanSearch(attention_tp=[2], expert_tp=[2], most_attention_nodes=3),
}
ALL_AT_ONCE = Poisson(rate_per_s=1e4, num_requests=1500, input_tokens=300, output_tokens=20)


@cache
def served(name: str) -> Result:
    return run(placed(PLANS[name]))


@pytest.mark.parametrize("name", PLANS)
def test_figures_count_all_gpus_and_what_they_cost(name: str) -> None:
    result = served(name)
    setup = check(placed(PLANS[name]))
    assert setup.experts is not None
    count = setup.experts.plan.num_gpus
    assert result["num_gpus"] == count
    assert result["price_of_l20s"] == pytest.approx(1.85 * count)
    per_gpu = result["throughput_tokens_per_s"] / count
    assert result["throughput_tokens_per_s_per_gpu"] == pytest.approx(per_gpu)
    tokens = 60 * 20 / result["duration_s"]
    assert result["throughput_tokens_per_s"] == pytest.approx(tokens)
    watts = 500 * count * result["busy_share"]
    joules = result["joules_per_output_token_at_power_limit"]
    assert joules == pytest.approx(watts * result["duration_s"] / (60 * 20))
    assert np.isnan(result["usd_per_hour"])
    assert 0 < result["busy_share"] <= 1
    assert result.cost_shares == {"datasheet roofline": 1.0}


def test_gpus_of_two_kinds_are_added_up() -> None:
    machines = Experts(expert_nodes=["l40s_x8"], context_tokens=300)
    plan = Disaggregated(attention_tp=2, num_attention_nodes=2, expert_tp=1)
    result = run(placed(plan, experts=machines))
    assert result["num_gpus"] == 4 + 8
    assert result["price_of_l20s"] == pytest.approx(4 * 1.85 + 8 * 1.08)
    assert check(placed(plan, experts=machines)).device == "h20 and l40s"


def test_a_search_runs_what_it_finds() -> None:
    setup = check(placed(PLANS["expert_plan_search"]))
    assert setup.experts is not None
    attention, experts, _ = setup.experts.plan.deployment
    given = Disaggregated(
        attention_tp=2, num_attention_nodes=attention.num_nodes, expert_tp=2,
        num_micro_batches=setup.experts.plan.deployment.num_micro_batches,
    )  # fmt: skip
    assert experts == Part("h20", 2, 8)
    assert_equal_traces(run(placed(given)).traces[0], served("expert_plan_search").traces[0])


def test_the_rule_says_how_many_micro_batches_go_round() -> None:
    for rule, count in ((PingPong(), 3), (PingPong(num_micro_batches=2), 2), (None, 1)):
        rules = {} if rule is None else {"micro_batching": rule}
        setup = check(placed(rules=rules))
        assert setup.experts is not None
        assert setup.experts.deployment.num_micro_batches == count
        expected = Deployment(Part("h20", 2, 2), Part("h20", 2, 8), 3)
        assert setup.experts.plan.deployment == expected


def test_micro_batches_raise_the_throughput_of_full_nodes_and_keep_the_slo() -> None:
    """A batch that fills the nodes: while experts compute one part, attention computes another."""
    load = {"workload": ALL_AT_ONCE, "experts": Experts(context_tokens=310, loads=Loads.expected),
            "model": Model(name="mixtral_8x22b")}  # fmt: skip
    whole, parts = (
        run(placed(rules=rules, **load)) for rules in ({}, {"micro_batching": PingPong()})
    )
    gain = parts["throughput_tokens_per_s"] / whole["throughput_tokens_per_s"]
    assert 1.2 < gain < 2.0
    assert parts["tpot_p99_s"] <= 0.15


def test_prompts_are_computed_here_or_come_with_their_kv() -> None:
    elsewhere = served("disaggregated")
    here = run(placed(TWO, experts=Experts(context_tokens=300, prefill_here=True)))
    assert here["prefill_mean_s"] > elsewhere["prefill_mean_s"]
    assert here["tpot_mean_s"] > elsewhere["tpot_mean_s"]
    # A prompt that is computed goes through all products; one that comes is one token more.
    architecture = check(placed(TWO)).architecture
    tokens, contexts = 60 * 20, 60 * sum(range(300, 320))
    decoded = tokens * (
        layer_flops_per_token(architecture) + lm_head(architecture).flops_per_token
    ) + contexts * architecture.num_layers * attention_flops_per_pair(architecture)
    assert elsewhere["flops"] == decoded
    prompts = here["flops"] - elsewhere["flops"]
    assert prompts == pytest.approx(60 * 299 * layer_flops_per_token(architecture), rel=0.02)
    for name in ("kv_bytes_written", "kv_bytes_read", "num_requests"):
        assert here[name] == elsewhere[name]


@pytest.mark.parametrize("skew", [0.0, 1.5])
def test_replicas_of_hot_experts_never_cost_throughput(skew: float) -> None:
    results = [
        run(placed(
            TWO, workload=ALL_AT_ONCE, token_routing=Skewed(skew=skew),
            experts=Experts(context_tokens=310, slots_per_node=slots),
            rules={"micro_batching": PingPong(), **rules},
        ))
        for slots, rules in ((None, {}), (2, {"expert_balance": ReplicateHot()}))
    ]  # fmt: skip
    static, replicated = (one["throughput_tokens_per_s"] for one in results)
    assert replicated >= 0.999 * static
    if skew:
        assert replicated > 1.05 * static


def test_the_same_seed_gives_the_same_trace_and_seeds_draw_other_loads() -> None:
    scenario = placed(TWO, seeds=[0, 1])
    one, other = run(scenario), run(scenario)
    for mine, theirs in zip(one.traces, other.traces, strict=True):
        assert_equal_traces(mine, theirs)
    assert one.figures[0]["duration_s"] != one.figures[1]["duration_s"]
    fixed = Experts(context_tokens=300, loads=Loads.expected)
    expected = run(placed(TWO, experts=fixed))
    assert expected["tpot_mean_s"] <= one.figures[0]["tpot_mean_s"]


def test_the_engines_overhead_is_paid_once_an_iteration() -> None:
    slow = run(placed(TWO, engine=Engine(iteration_overhead_s=0.01)))
    plain = served("disaggregated")
    # Iterations that last longer have more requests, and so they last a little longer still.
    assert 0.01 <= slow["itl_p50_s"] - plain["itl_p50_s"] < 0.015


@pytest.mark.parametrize("name", ["tiny_mixtral", "dbrx", "scaled_moe"])
def test_other_models_of_experts_are_served_too(name: str) -> None:
    plan = Disaggregated(attention_tp=2, num_attention_nodes=2, expert_tp=1)
    result = run(placed(plan, model=Model(name=name), slo=Slo()))
    assert result["num_requests"] == 60
    assert result["flops_utilisation"] < 1


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"engine": Engine(max_num_seqs=64)}, r"max_num_seqs=64 has no effect with a plan"),
        ({"engine": Engine(memory_utilization=0.5)}, r"memory_utilization=0.5 has no effect"),
        ({"engine": Engine(batches_in_flight=1)}, r"batches_in_flight=1 has no effect"),
        ({"engine": Engine(max_num_batched_tokens=512)}, r"max_num_batched_tokens=512 has no eff"),
        ({"plan": Disaggregated(attention_tp=2, expert_tp=2), "rules": {"routing": LeastLoaded()}},
         r"LeastLoaded has no effect with one attention node"),
        ({"plan": PLANS["expert_parallel"],
          "experts": Experts(expert_nodes=["l40s_x8"], context_tokens=300)},
         r"expert_nodes=\['l40s_x8'\] has no effect with a plan that has experts on the GPUs"),
        ({"experts": Experts(prefill_here=True, context_tokens=300),
          "rules": {"batching": ChunkedPrefill(chunk_tokens=1 << 41)}}, r"chunk_tokens=.* above"),
    ],
)  # fmt: skip
def test_settings_without_effect_on_a_plan_are_said(fields: dict, complaint: str) -> None:
    with pytest.warns(UserWarning, match=complaint):
        check(placed(**fields))


def test_the_token_budget_has_an_effect_where_prompts_are_computed() -> None:
    engine = Engine(max_num_batched_tokens=512)
    check(placed(engine=engine, experts=Experts(prefill_here=True, context_tokens=300)))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("experts", {"experts": Experts(prefill_here=True)}),
        ("token_routing", {"token_routing": Skewed()}),
        ("policy/micro_batching", {"policy": Policies(micro_batching=PingPong())}),
        ("policy/expert_balance", {"policy": Policies(expert_balance=ReplicateHot())}),
    ],
)
def test_settings_of_experts_without_effect_on_other_plans_are_said(
    name: str, fields: dict
) -> None:
    tensor = {
        "model": Model(name="tiny_mixtral"), "node": None, "gpu": placed().node.gpu,  # pyright: ignore[reportOptionalMemberAccess]
        "experts": Experts(), "policy": Policies(parallel_plan=Tensor()),
    }  # fmt: skip
    check(placed(**tensor))
    with pytest.warns(UserWarning, match=f"{name} has no effect with policy/parallel_plan=tensor"):
        check(placed(**(tensor | fields)))
