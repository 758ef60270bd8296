"""The plain Python door: `run(scenario) -> Result`, as notebooks use it."""

import warnings
from collections.abc import Callable

from sim.cost_shares import cost_shares
from sim.costs.fitted import Fitted
from sim.faults import Part, outages
from sim.policies.instance_plan.base import InstancePlan
from sim.policies.routing.prefix_aware import PrefixAware
from sim.policies.routing.round_robin import RoundRobin
from sim.processes.failover import Failures, simulate_failures
from sim.processes.pace import Costed
from sim.processes.replica import simulate
from sim.processes.router import simulate_replicas
from sim.processes.slowed import slowed_paces
from sim.provenance import provenance
from sim.result import Result
from sim.scenario import Scenario
from sim.setup import Setup, check_workload, prepare
from sim.summary import summarise
from sim.trace import Trace
from sim.workload.source import Source

__all__ = ["check", "run"]


def check(scenario: Scenario) -> Setup:
    """Refuse a scenario that cannot run, before anything is made.

    Raises:
        ValueError: what is wrong, with the value, the rule and the way out.
    """
    setup = prepare(scenario)
    _require_one_group(scenario.policy.instance_plan)
    _require_communication(scenario, setup)
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
        traces.append(_simulate(scenario, setup, seed))
    return Result(
        scenario=scenario,
        traces=tuple(traces),
        figures=tuple(summarise(scenario, setup, trace) for trace in traces),
        provenance=provenance(),
        cost_shares=cost_shares(setup.cost, traces),
    )


def _warnings(scenario: Scenario, setup: Setup) -> list[str]:
    """What runs but not as the user may think."""
    found = scenario.policy.batching.without_effect(setup.limits)
    overhead_s, node = scenario.engine.iteration_overhead_s, scenario.node
    if isinstance(setup.cost, Fitted) and overhead_s:
        found.append(
            f"engine.iteration_overhead_s={overhead_s} has no effect with "
            "cost=fitted, whose measurements contain the engine's overhead"
        )
    used = scenario.tp_size * scenario.pp_size
    if node is not None and node.num_gpus > used:
        found.append(
            f"node {node.name} has {node.num_gpus} GPUs and one replica uses {used}; "
            "the others cost nothing here and do nothing"
        )
    routing = scenario.policy.routing
    if scenario.num_replicas == 1 and type(routing) is not RoundRobin:
        found.append(
            f"policy/routing {type(routing).__name__} has no effect with num_replicas=1; "
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


def _simulate(scenario: Scenario, setup: Setup, seed: int) -> Trace:
    source = Source(scenario.workload, seed, setup.max_model_tokens)
    batching, pace = scenario.policy.batching, Costed(setup.cost)
    ahead = scenario.engine.schedules_ahead
    if scenario.faults:
        return _simulate_faults(scenario, setup, source)
    if scenario.num_replicas == 1:
        return simulate(source, batching, setup.limits, pace, schedules_ahead=ahead)
    return simulate_replicas(
        source, scenario.policy.routing, batching, setup.limits,
        [pace] * scenario.num_replicas, schedules_ahead=ahead,
    )  # fmt: skip


def _simulate_faults(scenario: Scenario, setup: Setup, source: Source) -> Trace:
    paces = slowed_paces(
        scenario.faults, setup.cost, scenario.num_replicas, setup.architecture.num_layers,
        (scenario.tp_size, scenario.pp_size),
    )  # fmt: skip
    trace = simulate_failures(
        source, scenario.policy.routing, scenario.policy.batching, setup.limits,
        lambda number, life: paces[number],
        Failures.detected(outages(scenario.faults), scenario.detection_s),
        num_replicas=scenario.num_replicas,
        schedules_ahead=scenario.engine.schedules_ahead,
    )  # fmt: skip
    end_s = float(trace.iterations["end_s"].max())
    for one in scenario.faults:
        if one.at_s >= end_s:
            text = f"{one} at at_s={one.at_s} has no effect: the last answer ends at {end_s:.4g} s"
            warnings.warn(f"{text}; move it, or ask for more", stacklevel=4)
    return trace


def _require_communication(scenario: Scenario, setup: Setup) -> None:
    if isinstance(setup.cost, Fitted):
        for one in scenario.faults:
            if one.part is Part.link or (scenario.pp_size > 1 and one.part is Part.gpu):
                raise ValueError(
                    f"{one}: cost=fitted measures iterations as a whole, and does not know what "
                    "part of them that is; take part=node, or another cost"
                )


def _require_one_group(plan: InstancePlan) -> None:
    groups = plan.groups(plan.init(), 1)
    if len(groups) != 1 or not (groups[0].prefills and groups[0].decodes):
        raise ValueError(
            f"instance plan {type(plan).__name__} makes {groups} of one instance, and a replica is "
            "one group that prefills and decodes; take policy/instance_plan=colocated"
        )
