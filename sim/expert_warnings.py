"""Settings that have no effect with a plan that places experts, or without one, in words."""

from dataclasses import fields

from sim.engine import Engine
from sim.experts import PlanCost
from sim.policies.parallel_plan.expert_plan_search import ExpertPlanSearch
from sim.policies.routing.round_robin import RoundRobin
from sim.scenario import Policies, Scenario
from sim.setup import Setup


def expert_settings_without_effect(scenario: Scenario) -> list[str]:
    """Settings about experts that a plan without places for them does not look at, in words."""
    default = Policies()
    idle = [
        f"policy/{name}"
        for name in ("micro_batching", "expert_balance")
        if getattr(scenario.policy, name) != getattr(default, name)
    ]
    fresh = {one.name: one.default_factory for one in fields(Scenario)}
    for name in ("experts", "token_routing"):
        made = fresh[name]
        if callable(made) and getattr(scenario, name) != made():
            idle.append(name)
    return [
        f"{name} has no effect with policy/parallel_plan=tensor, which places no experts; take "
        "policy/parallel_plan=disaggregated, expert_parallel or expert_plan_search"
        for name in idle
    ]


def plan_settings_without_effect(scenario: Scenario, setup: Setup) -> list[str]:
    """Settings that a plan that places experts does not look at, in words."""
    assert setup.experts is not None
    found = _idle_engine_settings(scenario) + scenario.policy.batching.without_effect(setup.limits)
    attention, holding, _ = setup.experts.plan.deployment
    routing = scenario.policy.routing
    if attention.num_nodes == 1 and type(routing) is not RoundRobin:
        found.append(
            f"policy/routing {type(routing).__name__} has no effect with one attention node; "
            "there is nothing to choose from"
        )
    if scenario.experts.plan_cost is not PlanCost.gpus and not isinstance(
        scenario.policy.parallel_plan, ExpertPlanSearch
    ):
        found.append(
            f"experts.plan_cost={scenario.experts.plan_cost.value} has no effect with a plan whose "
            "sizes are given; take policy/parallel_plan=expert_plan_search"
        )
    if holding is None and scenario.experts.expert_nodes:
        found.append(
            f"experts.expert_nodes={scenario.experts.expert_nodes} has no effect with a plan that "
            "has experts on the GPUs of attention; name nodes in experts.attention_nodes"
        )
    return found


def _idle_engine_settings(scenario: Scenario) -> list[str]:
    engine, default = scenario.engine, Engine()
    instead = {
        "max_num_seqs": "whose batch is the largest that memory and slo.tpot_s allow",
        "memory_utilization": "which fills experts.memory_utilization of the memory",
        "batches_in_flight": "whose batch goes round in micro-batches; see policy/micro_batching",
    }
    if not scenario.experts.prefill_here:
        instead["max_num_batched_tokens"] = (
            "and prompts that come with their KV; experts.prefill_here=true computes them"
        )
    return [
        f"engine.{name}={getattr(engine, name)} has no effect with a plan that places experts, "
        + reason
        for name, reason in instead.items()
        if getattr(engine, name) != getattr(default, name)
    ]
