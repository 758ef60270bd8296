"""Elastic instances of a scenario: their slots, what they cost, and what their plan may know."""

from dataclasses import dataclass, replace

from hardware_models.scaling import ScalingBase
from hardware_models.schema import Cluster
from sim.costs.base import StagedCost
from sim.costs.elastic import ElasticCost, Scaled
from sim.costs.elastic_kernels import Exchange, KernelGroups
from sim.costs.fitted import Fitted
from sim.costs.link_collectives import LinkCollectives
from sim.costs.scaled import ScaledIteration
from sim.elastic_profile import profiled_base
from sim.engine import Engine, ReplicaLimits
from sim.models.architecture import Architecture
from sim.node_choice import node_of
from sim.placement import place
from sim.policies.elastic import ElasticPlan
from sim.processes.elastic_instances import Deployment, simulate_elastic
from sim.processes.elastic_pace import CostedGroups
from sim.processes.kv_moves import NetworkTransport
from sim.refusals import refuse_combined
from sim.scenario import Scenario
from sim.trace import Trace
from sim.workload.knowledge import KnowledgeWorkload
from sim.workload.source import Source


@dataclass(frozen=True)
class ElasticSetup:
    """Instances that form groups anew for every iteration."""

    limits: ReplicaLimits
    """Of each: slots of one token."""
    num_instances: int
    cost: ElasticCost
    scaling: ScalingBase
    """What the plan knows."""

    @property
    def slots(self) -> int:
        """Tokens for whose KV all instances have room."""
        return self.limits.num_blocks * self.num_instances


def is_elastic(scenario: Scenario) -> bool:
    """Whether its plan forms groups anew for every iteration."""
    return isinstance(scenario.policy.instance_plan, ElasticPlan)


def require_slots(engine: Engine) -> None:
    """Refuse blocks of several tokens.

    Raises:
        ValueError: elastic instances keep KV of whole tokens anywhere.
    """
    if engine.block_size != 1:
        raise ValueError(
            f"engine.block_size={engine.block_size} must be 1: elastic instances keep KV of single "
            "tokens anywhere; set engine.block_size=1, and engine.num_blocks in tokens"
        )


def prepare_elastic(
    scenario: Scenario, architecture: Architecture, limits: ReplicaLimits, cost: StagedCost,
    kv_bytes_per_token: int,
) -> ElasticSetup:  # fmt: skip
    """Derive what elastic instances need.

    Args:
        scenario: what is asked for.
        architecture: the model.
        limits: of one instance as a replica.
        cost: of one instance as a replica.
        kv_bytes_per_token: of all layers and ranks.

    Raises:
        ValueError: what elastic instances are not combined with.
    """
    _refuse_others(scenario, cost)
    groups: ElasticCost
    if isinstance(cost, ScaledIteration):
        groups = Scaled(cost.base, scenario.engine.iteration_overhead_s)
    else:
        groups = KernelGroups(cost, _exchange(scenario, architecture, kv_bytes_per_token))
    known = scenario.scaling
    if known is None:
        known = profiled_base(groups, scenario.num_replicas, scenario.model.name)
    elif known.model != scenario.model.name or known.tp_size != scenario.tp_size:
        raise ValueError(
            f"scaling={known.name} is of model={known.model} with tp_size={known.tp_size}, and "
            f"there are model={scenario.model.name} and tp_size={scenario.tp_size}; take another, "
            "or scaling=null for a fit to the scenario's own cost"
        )
    if known.max_degree < scenario.num_replicas:
        raise ValueError(
            f"scaling={known.name} knows up to {known.max_degree} instances, and there are "
            f"num_replicas={scenario.num_replicas}; take fewer, or another scaling"
        )
    return ElasticSetup(limits, scenario.num_replicas, groups, known)


def simulate_elastic_seed(
    scenario: Scenario, setup: ElasticSetup, source: Source, kv_bytes_per_token: int
) -> Trace:
    """The trace of one run, with the groups that its instances formed."""
    plan = scenario.policy.instance_plan
    assert isinstance(plan, ElasticPlan)
    placement = place(scenario)
    trace, tables = simulate_elastic(
        source,
        Deployment(plan, setup.limits, setup.num_instances, setup.scaling, kv_bytes_per_token),
        CostedGroups(setup.cost),
        lambda environment: NetworkTransport(environment, placement),
        losses=sorted((one.at_s, one.replica) for one in scenario.faults),
    )
    return replace(trace, **vars(tables))


def _exchange(scenario: Scenario, architecture: Architecture, kv_bytes_per_token: int) -> Exchange:
    """Between the ranks of two instances: over the network, where they are on several nodes."""
    hardware = scenario.cluster or node_of(scenario, scenario.num_replicas)
    links = LinkCollectives(hardware)
    apart = isinstance(hardware, Cluster) and (
        scenario.num_replicas * scenario.tp_size > hardware.node.num_gpus
    )
    nodes = 2 if apart else 1
    latency_s = links.seconds("send_recv", 2, 0, nodes).seconds
    probe_bytes = 1e8
    moving_s = links.seconds("send_recv", 2, probe_bytes, nodes).seconds - latency_s
    layers, ranks = architecture.num_layers, scenario.tp_size
    query = architecture.num_heads * architecture.head_dim / ranks
    # There a query in the model's type; back a partial result in float32 with its log-sum-exp.
    query_bytes = query * (scenario.model.dtype.num_bytes + 4) + 4 * architecture.num_heads / ranks
    return Exchange(
        layers, latency_s, probe_bytes / moving_s, kv_bytes_per_token / layers / ranks, query_bytes
    )


def _refuse_others(scenario: Scenario, cost: StagedCost) -> None:
    """Refuse what elastic instances are not combined with.

    Raises:
        ValueError: names it, and what to take.
    """
    engine = scenario.engine
    lasting = [one for one in scenario.faults if not (one.kills and one.until_s is None)]
    refused = [
        (isinstance(cost, Fitted), "cost=fitted", "cost=scaled or roofline"),
        (scenario.pp_size > 1, f"pp_size={scenario.pp_size}", "pp_size=1"),
        (bool(lasting), f"{lasting[0]}" if lasting else "",
         "part=node, kind=dead and no until_s: instances do not come back"),
        (engine.schedules_ahead, "engine.schedules_ahead=true", "engine.schedules_ahead=false"),
        (engine.prefix_caching, "engine.prefix_caching=true", "engine.prefix_caching=false"),
        (isinstance(scenario.workload, KnowledgeWorkload),
         f"workload {type(scenario.workload).__name__}", "another workload"),
    ]  # fmt: skip
    name = type(scenario.policy.instance_plan).__name__
    refuse_combined(f"instance plan {name} forms groups anew", refused)
