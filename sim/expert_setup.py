"""What a plan that places experts settles before a run. Refuses what cannot run."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hardware_models.parts import load_node
from hardware_models.schema import Gpu, Node
from sim.costs.expert_nodes import ElementTypes
from sim.costs.seconds import Seconds
from sim.engine import ReplicaLimits
from sim.expert_costs import DeploymentCosts, expert_part
from sim.experts import Experts, Loads, PlanCost
from sim.models.architecture import Architecture
from sim.models.parameters import kv_bytes_per_token, parameter_counts
from sim.models.split import require_parallel
from sim.models.work import IterationShape
from sim.node_choice import node_of
from sim.policies.expert_balance.base import BalanceView, checked_placement
from sim.policies.instance_plan.colocated import Colocated
from sim.policies.parallel_plan.base import (
    Deployment,
    GpuType,
    ModelSizes,
    Part,
    Plan,
    PlanView,
)
from sim.processes.expert_pace import ExpertLoads
from sim.refusals import refuse_combined
from sim.scenario import CostFamily, Scenario
from sim.state.ping_pong import total_s
from sim.workload.knowledge import KnowledgeWorkload
from sim.workload.source import check

UNLIMITED_TOKENS = 1 << 40
"""Of an iteration, where prompts are not computed."""


@dataclass(frozen=True, slots=True)
class ExpertSetup:
    """A deployment, ready to run."""

    plan: Plan
    costs: DeploymentCosts
    """Of the simulation; the plan may have been made with others."""
    deployment: Deployment
    """That of the plan, with the micro-batches that the rule asks for."""
    nodes: dict[str, Node]
    """By the name of their GPU."""

    @property
    def num_gpus(self) -> int:
        """Of both kinds."""
        return self.plan.num_gpus

    def total(self, of: Callable[[Gpu], float | None]) -> float | None:
        """The sum of something over all GPUs; None where it is not known of some."""
        attention, experts, _ = self.plan.deployment
        total = 0.0
        for part in (attention, experts):
            gpu = self.nodes[part.gpu].gpu if part is not None else None
            if part is None or gpu is None:
                continue
            if (value := of(gpu)) is None:
                return None
            total += part.num_gpus * value
        return total


class EvenCost:
    """A `StagedCost` of iterations in which all nodes and micro-batches are alike."""

    slow_down = 1.0

    def __init__(self, setup: ExpertSetup) -> None:
        self._setup = setup

    def iteration_s(self, shape: IterationShape) -> float:
        """Seconds of one iteration that decodes what the shape holds."""
        plan, count = self._setup.plan, self._setup.deployment.num_micro_batches
        nodes = plan.deployment.attention.num_nodes
        tokens = max(-(-shape.tokens // (nodes * count)), 1)
        context = (shape.decode_context + shape.prefill_context) / max(shape.tokens, 1)
        stages = self._setup.costs.stages(plan.deployment, tokens, context)
        layers = self._setup.costs.architecture.num_layers
        return total_s(stages, count, layers) + self.sampled_s(tokens)

    def decode_run_s(self, num_decodes: int, decode_context: int, iterations: int) -> list[float]:
        """Seconds of each iteration of a decode stretch."""
        contexts = range(decode_context, decode_context + iterations * num_decodes, num_decodes)
        return [
            self.iteration_s(IterationShape(0, 0, 0, 0, num_decodes, one, num_decodes))
            for one in contexts
        ]

    def sources(self, shape: IterationShape) -> Seconds:
        """What a micro-batch of a node's decodes rests on, over all stations."""
        deployment = self._setup.deployment
        tokens = max(-(-shape.tokens // deployment.num_micro_batches), 1)
        context = (shape.decode_context + shape.prefill_context) / max(shape.tokens, 1)
        return self._setup.costs.sources(deployment, tokens, max(context, 1.0))

    def sampled_s(self, positions: int) -> float:
        """Seconds outside of the layers for so many tokens on one node."""
        return self._setup.costs.outside_s(self._setup.plan.deployment, positions)


def places_experts(scenario: Scenario) -> bool:
    """Whether a scenario's plan gives experts places of their own."""
    return scenario.policy.parallel_plan.places_experts


def prepare_experts(scenario: Scenario, architecture: Architecture, max_tokens: int) -> ExpertSetup:
    """Make the plan of a scenario.

    Raises:
        ValueError: something that such a plan is not combined with, or no plan fits.
    """
    _refuse_others(scenario)
    experts = scenario.experts
    attention = _nodes(scenario, experts.attention_nodes)
    holding = _nodes(scenario, experts.expert_nodes) if experts.expert_nodes else attention
    nodes = _by_gpu([*attention, *holding])
    dtype = scenario.model.dtype
    types = ElementTypes(
        dtype.value, dtype.num_bytes, scenario.model.cache_dtype.num_bytes,
        scenario.model.cache_dtype.value,
    )  # fmt: skip
    tables = None
    if scenario.cost is CostFamily.profiled:
        tables = (scenario.engine.framework, scenario.engine.framework_version)
    costs = DeploymentCosts(architecture, nodes, types, tables=tables)
    view = PlanView(
        sizes_of(architecture, types),
        tuple(gpu_type(node, architecture, experts) for node in attention),
        tuple(gpu_type(node, architecture, experts) for node in holding),
        experts.context_tokens or _mean_context(scenario, max_tokens),
        scenario.slo.tpot_s or float("inf"),
        DeploymentCosts(architecture, nodes, types, ideal=True) if experts.peaks_reached else costs,
    )  # fmt: skip
    plan = scenario.policy.parallel_plan.plan(view)
    planned = plan.deployment.num_micro_batches
    count = scenario.policy.micro_batching.count(planned)
    if plan.deployment.experts is None and count > 1:
        raise ValueError(
            f"micro_batching asks for {count} micro-batches, and the plan has experts on the GPUs "
            "of attention, where nothing overlaps; take policy/micro_batching=none, or a plan with "
            "experts apart"
        )
    setup = ExpertSetup(plan, costs, plan.deployment._replace(num_micro_batches=count), nodes)
    _require_room(scenario, setup)
    return setup


def node_limits(scenario: Scenario, setup: ExpertSetup) -> ReplicaLimits:
    """The limits of one attention node: the plan's batch, and the KV that its memory holds.

    Raises:
        ValueError: the pool is larger than the memory.
    """
    plan, engine, architecture = setup.plan, scenario.engine, setup.costs.architecture
    attention = plan.deployment.attention
    gpu = setup.nodes[attention.gpu].gpu
    assert gpu is not None
    sizes = sizes_of(architecture, setup.costs.types)
    held = sizes.attention_bytes
    if plan.deployment.experts is None:
        part, slots = expert_slots(scenario, setup)
        held += slots * sizes.expert_bytes * attention.tp_size / part.tp_size
    share = scenario.experts.memory_utilization
    room = attention.tp_size * share * gpu.usable_memory_bytes - held
    fitting = int(room // (engine.block_size * sizes.kv_bytes_per_token))
    if engine.num_blocks is not None and engine.num_blocks > fitting:
        raise ValueError(
            f"engine.num_blocks={engine.num_blocks} KV blocks do not fit on an attention node of "
            f"{attention.tp_size} {attention.gpu}, which has room for {fitting}; lower it"
        )
    tokens = engine.max_num_batched_tokens or UNLIMITED_TOKENS
    return ReplicaLimits(
        plan.batch // attention.num_nodes,
        max(tokens, plan.batch) if scenario.experts.prefill_here else UNLIMITED_TOKENS,
        engine.block_size,
        engine.num_blocks or fitting,
    )


def loads_of(scenario: Scenario, setup: ExpertSetup, seed: int) -> ExpertLoads:
    """What each expert gets in a run, and where the balance rule has placed it for that.

    Raises:
        ValueError: the experts do not fit the slots.
    """
    architecture = setup.costs.architecture
    num_experts, top_k = architecture.num_experts, architecture.experts_per_token
    shares = scenario.token_routing.loads(seed, architecture.num_layers, num_experts, top_k)
    part, slots = expert_slots(scenario, setup)
    view = BalanceView(np.asarray(shares), part.num_nodes, slots)
    placement = checked_placement(scenario.policy.expert_balance, view)
    return ExpertLoads(shares, placement, scenario.experts.loads is Loads.drawn, seed)


def expert_slots(scenario: Scenario, setup: ExpertSetup) -> tuple[Part, int]:
    """The nodes that hold experts, and how many of each layer, replicas included, one has."""
    num_experts = setup.costs.architecture.num_experts
    part = expert_part(setup.plan.deployment, num_experts)
    return part, scenario.experts.slots_per_node or -(-num_experts // part.num_nodes)


def sizes_of(architecture: Architecture, types: ElementTypes) -> ModelSizes:
    """What a plan needs to know of a model."""
    a, counts = architecture, parameter_counts(architecture)
    routed = counts["expert_gate_up"] + counts["expert_down"]
    return ModelSizes(
        a.num_layers, a.num_experts, a.experts_per_token,
        (sum(counts.values()) - routed) * types.dtype_bytes,
        routed / a.num_experts * types.dtype_bytes,
        kv_bytes_per_token(a, types.kv_dtype_bytes),
    )  # fmt: skip


def gpu_type(node: Node, architecture: Architecture, experts: Experts) -> GpuType:
    """A node's GPU as a plan sees it.

    Raises:
        ValueError: what the plan divides by is not known of it.
    """
    gpu = node.gpu
    assert gpu is not None
    sizes: list[int] = []
    for size in range(1, node.num_gpus + 1):
        try:
            require_parallel(architecture, size, 1)
        except ValueError:
            continue
        sizes.append(size)
    usable = experts.memory_utilization * gpu.usable_memory_bytes
    return GpuType(gpu.name, usable, plan_cost(gpu, experts.plan_cost), tuple(sizes))


def plan_cost(gpu: Gpu, kind: PlanCost) -> float:
    """What one GPU counts.

    Raises:
        ValueError: it is not known.
    """
    if kind is PlanCost.gpus:
        return 1.0
    price = gpu.price.relative_to_l20 if gpu.price is not None else None
    watts = gpu.power.limit_w if gpu.power is not None else None
    value = price if kind is PlanCost.price else watts
    if value is None:
        raise ValueError(
            f"experts.plan_cost={kind.value} is not known of {gpu.name}; take another GPU, or "
            "experts.plan_cost=gpus"
        )
    return value


def _nodes(scenario: Scenario, names: list[str]) -> list[Node]:
    found = [load_node(name) for name in names] or [node_of(scenario)]
    for node in found:
        if node.gpu is None:
            raise ValueError(
                f"node {node.name} has no GPU, and a plan places attention and experts on GPUs; "
                "name others in experts.attention_nodes and experts.expert_nodes"
            )
    return found


def _by_gpu(nodes: list[Node]) -> dict[str, Node]:
    found: dict[str, Node] = {}
    for node in nodes:
        name = node.gpu.name if node.gpu is not None else ""
        other = found.setdefault(name, node)
        if other.name != node.name:
            raise ValueError(
                f"experts.attention_nodes and experts.expert_nodes: {other.name} and {node.name} "
                f"have the same GPU {name}, by which a plan knows its node; take one of the two"
            )
    return found


def _require_room(scenario: Scenario, setup: ExpertSetup) -> None:
    """Refuse replicas of experts that the plan, which has each once, left no room for.

    Raises:
        ValueError: they do not fit; says by how much.
    """
    part, slots = expert_slots(scenario, setup)
    gpu = setup.nodes[part.gpu].gpu
    assert gpu is not None
    sizes = sizes_of(setup.costs.architecture, setup.costs.types)
    needed = slots * sizes.expert_bytes / part.tp_size
    if setup.plan.deployment.experts is None:
        needed += sizes.attention_bytes / setup.plan.deployment.attention.tp_size
    allowed = scenario.experts.memory_utilization * gpu.usable_memory_bytes
    if needed > allowed:
        raise ValueError(
            f"experts.slots_per_node={slots} takes {needed / 2**30:.4g} GiB of weights on each "
            f"{part.gpu}, which may fill {allowed / 2**30:.4g}; lower it, or take larger nodes"
        )


def _mean_context(scenario: Scenario, max_tokens: int) -> float:
    """Of a request in the middle of its answer."""
    totals = check(scenario.workload, scenario.seeds[0], max_tokens)
    return (totals.prompt_tokens + totals.output_tokens / 2) / totals.num_requests


def _refuse_others(scenario: Scenario) -> None:
    """Refuse what a plan that places experts is not combined with.

    Raises:
        ValueError: names it, and what to take.
    """
    engine, plan = scenario.engine, scenario.policy.instance_plan
    refused = [
        (scenario.cost is CostFamily.fitted, "cost=fitted", "cost=roofline or profiled"),
        (scenario.cost_tables is not None, f"cost_tables={scenario.cost_tables}",
         "cost_tables=null"),
        (scenario.num_replicas > 1, f"num_replicas={scenario.num_replicas}", "num_replicas=1"),
        (scenario.tp_size > 1, f"tp_size={scenario.tp_size}", "tp_size=1"),
        (scenario.pp_size > 1, f"pp_size={scenario.pp_size}", "pp_size=1"),
        (type(plan) is not Colocated, f"instance plan {type(plan).__name__}",
         "policy/instance_plan=colocated"),
        (bool(scenario.faults), f"faults={scenario.faults}", "faults=[]"),
        (engine.schedules_ahead, "engine.schedules_ahead=true", "engine.schedules_ahead=false"),
        (engine.prefix_caching, "engine.prefix_caching=true", "engine.prefix_caching=false"),
        (isinstance(scenario.workload, KnowledgeWorkload),
         f"workload {type(scenario.workload).__name__}", "another workload"),
    ]  # fmt: skip
    name = type(scenario.policy.parallel_plan).__name__
    refuse_combined(f"parallel plan {name} places experts", refused)
