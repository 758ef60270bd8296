"""Simulates one seed of a scenario: which executor its replicas, plan and faults ask for."""

import warnings
from functools import partial

from sim.costs.fitted import Fitted
from sim.elastic_setup import simulate_elastic_seed
from sim.expert_setup import ExpertSetup, loads_of
from sim.faults import Part, outages
from sim.knowledge_setup import check_knowledge, retrieves, simulate_knowledge_seed
from sim.models.split import stage_layers
from sim.placement import place
from sim.policies.instance_plan.base import phases
from sim.processes.alone import simulate
from sim.processes.expert_pace import ExpertPace
from sim.processes.expert_pipeline import PipelineRules, simulate_expert_pipeline
from sim.processes.failover import Failures, simulate_failures
from sim.processes.hand_over import simulate_hand_over
from sim.processes.kv_moves import NetworkTransport
from sim.processes.pace import Costed, Pace
from sim.processes.pipeline import Pipeline, lanes_of
from sim.processes.router import Engines, simulate_replicas
from sim.processes.slowed import slowed_paces
from sim.scenario import Scenario
from sim.setup import Setup
from sim.trace import Trace
from sim.workload.source import Source


def simulate_seed(scenario: Scenario, setup: Setup, seed: int) -> Trace:
    """The trace of one run; see `sim.api.check` for what cannot run."""
    if retrieves(scenario):
        return simulate_knowledge_seed(scenario, setup, seed)
    source = Source(scenario.workload, seed, setup.max_model_tokens)
    if setup.experts is not None:
        return _with_experts(scenario, setup, setup.experts, seed)
    if setup.elastic is not None:
        return simulate_elastic_seed(scenario, setup.elastic, source, setup.kv_bytes_per_token)
    policy, ahead = scenario.policy, scenario.engine.schedules_ahead
    if any(one.kills for one in scenario.faults):
        trace = _with_deaths(scenario, setup, source)
    elif scenario.num_replicas * setup.lanes == 1:
        trace = simulate(
            source, policy.batching, setup.limits, _paces(scenario, setup)[0], schedules_ahead=ahead
        )
    else:
        engines = Engines(
            batching=policy.batching, limits=setup.limits, paces=_paces(scenario, setup),
            schedules_ahead=ahead,
        )  # fmt: skip
        if separates_phases(scenario):
            transport = partial(NetworkTransport, placement=place(scenario))
            trace = simulate_hand_over(
                source, policy.routing, policy.instance_plan, engines, transport,
                setup.kv_bytes_per_token,
            )  # fmt: skip
        else:
            trace = simulate_replicas(source, policy.routing, engines)
    _warn_of_late_faults(scenario, trace)
    return trace


def separates_phases(scenario: Scenario) -> bool:
    """Whether requests are prefilled on some replicas and decoded on others.

    Raises:
        ValueError: the plan cannot group so many replicas.
    """
    return bool(phases(scenario.policy.instance_plan, scenario.num_replicas)[1])


def check_deployment(scenario: Scenario, setup: Setup) -> None:
    """Refuse replicas that have no place, and faults that nobody can simulate.

    Raises:
        ValueError: what is wrong, with the value, the rule and the way out.
    """
    if setup.experts is not None:
        for seed in scenario.seeds:
            loads_of(scenario, setup.experts, seed)
        return
    apart = separates_phases(scenario)
    if apart or scenario.cluster is not None or setup.elastic is not None:
        place(scenario)
    if setup.elastic is not None:
        return
    if retrieves(scenario):
        for seed in scenario.seeds:
            check_knowledge(scenario, setup, seed)
    for one in scenario.faults:
        if apart and one.kills:
            raise ValueError(
                f"{one}: replicas that hand requests over do not die here; take "
                "policy/instance_plan=colocated, or kind=slow"
            )
        inside = one.part is Part.link or (scenario.pp_size > 1 and one.part is Part.gpu)
        if isinstance(setup.cost, Fitted) and inside:
            raise ValueError(
                f"{one}: cost=fitted measures iterations as a whole, and does not know what part "
                "of them that is; take part=node, or another cost"
            )


def _with_experts(scenario: Scenario, setup: Setup, experts: ExpertSetup, seed: int) -> Trace:
    deployment, policy = experts.deployment, scenario.policy
    pace = ExpertPace(
        experts.costs, deployment, loads_of(scenario, experts, seed),
        overhead_s=scenario.engine.iteration_overhead_s,
        prefill_here=scenario.experts.prefill_here,
    )  # fmt: skip
    return simulate_expert_pipeline(
        Source(scenario.workload, seed, setup.max_model_tokens),
        PipelineRules(policy.batching, policy.micro_batching, policy.routing),
        setup.limits, (deployment.attention.num_nodes, deployment.num_micro_batches), pace,
    )  # fmt: skip


def _paces(scenario: Scenario, setup: Setup) -> list[Pace]:
    """One a lane of every replica; the lanes of a replica share its stages."""
    if setup.lanes > 1:
        stages = stage_layers(setup.architecture.num_layers, scenario.pp_size)
        layers = [len(stage) for stage in stages]
        pipelines = [Pipeline(setup.cost, layers) for _ in range(scenario.num_replicas)]
        return [*lanes_of(pipelines, setup.lanes)]
    if not scenario.faults:
        return [Costed(setup.cost)] * scenario.num_replicas
    return slowed_paces(
        scenario.faults, setup.cost, scenario.num_replicas, setup.architecture.num_layers,
        (scenario.tp_size, scenario.pp_size),
    )  # fmt: skip


def _with_deaths(scenario: Scenario, setup: Setup, source: Source) -> Trace:
    paces = _paces(scenario, setup)
    return simulate_failures(
        source, scenario.policy.routing, scenario.policy.batching, setup.limits,
        lambda number, life: paces[number],
        Failures.detected(outages(scenario.faults), scenario.detection_s),
        num_replicas=scenario.num_replicas,
        schedules_ahead=scenario.engine.schedules_ahead,
    )  # fmt: skip


def _warn_of_late_faults(scenario: Scenario, trace: Trace) -> None:
    if not scenario.faults:
        return
    end_s = float(trace.iterations["end_s"].max())
    for one in scenario.faults:
        if one.at_s >= end_s:
            text = f"{one} at at_s={one.at_s} has no effect: the last answer ends at {end_s:.4g} s"
            warnings.warn(f"{text}; move it, or ask for more", stacklevel=5)
