"""The plain Python door: `run(scenario) -> Result`, as notebooks use it."""

import warnings
from collections.abc import Callable
from functools import partial

from sim.cost_shares import cost_shares
from sim.costs.fitted import Fitted
from sim.models.split import stage_layers
from sim.placement import place
from sim.policies.instance_plan.base import phases
from sim.policies.routing.prefix_aware import PrefixAware
from sim.policies.routing.round_robin import RoundRobin
from sim.processes.hand_over import simulate_hand_over
from sim.processes.kv_moves import NetworkTransport
from sim.processes.pace import Costed, Pace
from sim.processes.pipeline import Pipeline, lanes_of
from sim.processes.replica import simulate
from sim.processes.router import Engines, simulate_replicas
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
    if _phases(scenario)[1]:
        place(scenario)
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
    first, second = _phases(scenario)
    uses = f"one replica uses {used}"
    if second:
        used *= scenario.num_replicas
        uses = f"{scenario.num_replicas} instances use {used}"
    if node is not None and node.num_gpus > used:
        found.append(
            f"node {node.name} has {node.num_gpus} GPUs and {uses}; "
            "the others cost nothing here and do nothing"
        )
    routing = scenario.policy.routing
    if second and scenario.pp_size > 1 and scenario.engine.batches_in_flight is None:
        found.append(
            "instances that move KV keep one batch in flight, and their "
            f"pp_size={scenario.pp_size} stages wait for each other; "
            "engine.batches_in_flight=1 says that this is meant"
        )
    if len(first) * setup.lanes == 1 and type(routing) is not RoundRobin:
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


def _simulate(scenario: Scenario, setup: Setup, seed: int) -> Trace:
    source = Source(scenario.workload, seed, setup.max_model_tokens)
    batching, paces = scenario.policy.batching, _paces(scenario, setup)
    ahead = scenario.engine.schedules_ahead
    if len(paces) == 1:
        return simulate(source, batching, setup.limits, paces[0], schedules_ahead=ahead)
    engines = Engines(
        batching=batching, limits=setup.limits, paces=paces, schedules_ahead=ahead
    )  # fmt: skip
    routing, plan = scenario.policy.routing, scenario.policy.instance_plan
    if _phases(scenario)[1]:
        transport = partial(NetworkTransport, placement=place(scenario))
        return simulate_hand_over(
            source, routing, plan, engines, transport, setup.kv_bytes_per_token
        )
    return simulate_replicas(source, routing, engines)


def _paces(scenario: Scenario, setup: Setup) -> list[Pace]:
    """One a lane of every replica; the lanes of a replica share its stages."""
    if setup.lanes == 1:
        return [Costed(setup.cost)] * scenario.num_replicas
    stages = stage_layers(setup.architecture.num_layers, scenario.pp_size)
    layers = [len(stage) for stage in stages]
    pipelines = [Pipeline(setup.cost, layers) for _ in range(scenario.num_replicas)]
    return [*lanes_of(pipelines, setup.lanes)]


def _phases(scenario: Scenario) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return phases(scenario.policy.instance_plan, scenario.num_replicas)
