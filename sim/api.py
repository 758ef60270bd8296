"""The plain Python door: `run(scenario) -> Result`, as notebooks use it."""

import warnings
from collections.abc import Callable

from sim.cost_shares import cost_shares
from sim.costs.fitted import Fitted
from sim.costs.scaled import ScaledIteration
from sim.deployment import check_deployment, simulate_seed
from sim.expert_warnings import expert_settings_without_effect, plan_settings_without_effect
from sim.policies.instance_plan.base import phases
from sim.policies.routing.prefix_aware import PrefixAware
from sim.policies.routing.round_robin import RoundRobin
from sim.provenance import provenance
from sim.result import Result
from sim.scenario import Policies, Scenario
from sim.setup import Setup, check_workload, one_batch_for, prepare
from sim.summary import summarise
from sim.trace import Trace

__all__ = ["check", "run"]


def check(scenario: Scenario) -> Setup:
    """Refuse a scenario that cannot run, before anything is made.

    Raises:
        ValueError: what is wrong, with the value, the rule and the way out.
    """
    setup = prepare(scenario)
    check_deployment(scenario, setup)
    for text in _warnings(scenario, setup):
        warnings.warn(text, stacklevel=2)
    for seed in scenario.seeds:
        check_workload(scenario, setup, seed)
    return setup


def run(scenario: Scenario, seed_begins: Callable[[int], None] = lambda _: None) -> Result:
    """Simulate a scenario, once a seed.

    Args:
        scenario: what to simulate.
        seed_begins: told of each seed before its run, for those who show progress.

    Raises:
        ValueError: it cannot run; see `check`.
    """
    setup = check(scenario)
    traces: list[Trace] = []
    for seed in scenario.seeds:
        seed_begins(seed)
        traces.append(simulate_seed(scenario, setup, seed))
    return Result(
        scenario=scenario,
        traces=tuple(traces),
        figures=tuple(summarise(scenario, setup, trace) for trace in traces),
        provenance=provenance(),
        cost_shares=cost_shares(setup.cost, traces),
    )


def _warnings(scenario: Scenario, setup: Setup) -> list[str]:
    """What runs but not as the user may think."""
    if setup.experts is not None:
        return plan_settings_without_effect(scenario, setup)
    found = scenario.policy.batching.without_effect(setup.limits)
    found += expert_settings_without_effect(scenario)
    overhead_s, node = scenario.engine.iteration_overhead_s, scenario.node
    if isinstance(setup.cost, Fitted) and overhead_s:
        found.append(
            f"engine.iteration_overhead_s={overhead_s} has no effect with "
            "cost=fitted, whose measurements contain the engine's overhead"
        )
    used = scenario.tp_size * scenario.pp_size
    first, second = phases(scenario.policy.instance_plan, scenario.num_replicas)
    uses = f"one replica uses {used}"
    if second or setup.elastic is not None:
        used *= scenario.num_replicas
        uses = f"{scenario.num_replicas} instances use {used}"
    if node is not None and node.num_gpus > used:
        found.append(
            f"node {node.name} has {node.num_gpus} GPUs and {uses}; "
            "the others cost nothing here and do nothing"
        )
    routing = scenario.policy.routing
    reason = one_batch_for(scenario)
    if reason and scenario.pp_size > 1 and scenario.engine.batches_in_flight is None:
        found.append(
            f"with {reason} a replica keeps one batch in flight, and its "
            f"pp_size={scenario.pp_size} stages wait for each other; "
            "engine.batches_in_flight=1 says that this is meant"
        )
    scales = setup.elastic is not None or isinstance(setup.cost, ScaledIteration)
    if scenario.scaling is not None and not scales:
        found.append(
            f"scaling={scenario.scaling.name} has no effect with cost={scenario.cost.value} and "
            "without elastic instances; take cost=scaled, or scaling=null"
        )
    if setup.elastic is not None:
        found += _without_effect_on_elastic(scenario)
    elif len(first) * setup.lanes == 1 and type(routing) is not RoundRobin:
        what = f"num_prefill={len(first)}" if second else "num_replicas=1"
        found.append(
            f"policy/routing {type(routing).__name__} has no effect with {what}; "
            "there is nothing to choose from"
        )
    elif isinstance(routing, PrefixAware) and not setup.limits.prefix_caching:
        found.append(
            "policy/routing=prefix_aware follows prefixes that no replica keeps; "
            "set engine.prefix_caching=true"
        )
    window = setup.architecture.sliding_window
    if window is not None and setup.max_model_tokens > window:
        found.append(
            f"{setup.architecture.name} attends to the last {window} tokens; longer contexts are "
            f"costed in full, an upper bound (engine.max_model_len={window} forbids them)"
        )
    return found


def _without_effect_on_elastic(scenario: Scenario) -> list[str]:
    """Rules that elastic instances do not ask."""
    defaults = {"routing": RoundRobin, "batching": type(Policies().batching)}
    return [
        f"policy/{family} {type(getattr(scenario.policy, family)).__name__} has no effect with "
        f"instance plan {type(scenario.policy.instance_plan).__name__}, which decides that itself"
        for family, default in defaults.items()
        if type(getattr(scenario.policy, family)) is not default
    ]
