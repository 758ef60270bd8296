"""What a scenario settles before a run: architecture, limits, cost. Refuses what cannot run."""

from collections.abc import Callable
from dataclasses import dataclass

from sim.cost_choice import cost_of
from sim.costs.base import StagedCost
from sim.elastic_setup import ElasticSetup, is_elastic, prepare_elastic, require_slots
from sim.engine import Engine, ReplicaLimits
from sim.engine_profiles import batch_limits
from sim.expert_setup import (
    EvenCost,
    ExpertSetup,
    node_limits,
    places_experts,
    prepare_experts,
)
from sim.lanes import lane_limits, num_lanes
from sim.memory import Device, device_of, kv_blocks, memory_need
from sim.models.architecture import Architecture, load_architecture
from sim.models.parallel import stage_part, tensor_part
from sim.models.parameters import kv_bytes_per_token
from sim.models.split import require_parallel
from sim.policies.instance_plan.base import phases
from sim.scenario import Scenario
from sim.workload.source import WorkloadTotals, check

MAX_TP_SIZE = 64
"""Largest number of ranks that is tried for a model that does not fit."""


@dataclass(frozen=True, slots=True)
class Setup:
    """A replica, ready to run."""

    architecture: Architecture
    limits: ReplicaLimits
    """Of each lane: of the replica, where it has one batch in flight."""
    max_model_tokens: int
    """Prompt and answer of one request together, at most."""
    cost: StagedCost
    device: str
    """Name of the GPU or CPU."""
    kv_bytes_per_token: int
    lanes: int = 1
    """Batches that a replica has in flight."""
    experts: ExpertSetup | None = None
    """Where its plan places experts; `limits` are then those of an attention node."""
    elastic: ElasticSetup | None = None
    """Where its plan forms groups anew; `limits` and `cost` are then those of one instance."""

    def kv_bytes_moved(self, tokens: int) -> int:
        """Bytes that move with the KV of so many tokens of one request: blocks move whole."""
        return self.limits.block_tokens(tokens) * self.kv_bytes_per_token


def prepare(scenario: Scenario) -> Setup:
    """Derive all that a replica needs.

    Raises:
        ValueError: no hardware, a model that does not fit, or a cost that the hardware lacks.
    """
    architecture = load_architecture(scenario.model.config or scenario.model.name)
    if places_experts(scenario):
        return _with_experts(scenario, architecture)
    require_parallel(architecture, scenario.tp_size, scenario.pp_size)
    device = device_of(scenario.machine, scenario.gpu)
    max_tokens = _context(scenario.engine, architecture)
    if is_elastic(scenario):
        require_slots(scenario.engine)
    lanes = lanes_of_replica(scenario)
    limits = lane_limits(_limits(scenario, architecture, device), lanes)
    cost = cost_of(scenario, architecture, device)
    kv_bytes = kv_bytes_per_token(architecture, scenario.model.cache_dtype.num_bytes)
    elastic = None
    if is_elastic(scenario):
        elastic = prepare_elastic(scenario, architecture, limits, cost, kv_bytes)
        max_tokens = min(max_tokens, elastic.slots)
    return Setup(
        architecture=architecture,
        limits=limits,
        max_model_tokens=max_tokens,
        cost=cost,
        device=device.name,
        kv_bytes_per_token=kv_bytes,
        lanes=lanes,
        elastic=elastic,
    )


def _with_experts(scenario: Scenario, architecture: Architecture) -> Setup:
    max_tokens = _context(scenario.engine, architecture)
    experts = prepare_experts(scenario, architecture, max_tokens)
    attention, holding, _ = experts.plan.deployment
    return Setup(
        architecture=architecture,
        limits=node_limits(scenario, experts),
        max_model_tokens=max_tokens,
        cost=EvenCost(experts),
        device=attention.gpu if holding is None else f"{attention.gpu} and {holding.gpu}",
        kv_bytes_per_token=kv_bytes_per_token(architecture, scenario.model.cache_dtype.num_bytes),
        experts=experts,
    )


def lanes_of_replica(scenario: Scenario) -> int:
    """Batches that each replica of a scenario has in flight.

    Raises:
        ValueError: more than it has stages, or several where there may be one.
    """
    return num_lanes(
        scenario.engine.batches_in_flight, scenario.pp_size, one_for=one_batch_for(scenario)
    )


def one_batch_for(scenario: Scenario) -> str:
    """What of a scenario keeps its replicas to one batch in flight; empty: nothing."""
    if phases(scenario.policy.instance_plan, scenario.num_replicas)[1]:
        return "instances that move KV"
    if is_elastic(scenario):
        return "elastic instances"
    return "faults" if scenario.faults else ""


def check_workload(scenario: Scenario, setup: Setup, seed: int) -> WorkloadTotals:
    """Read the workload once: it must not be empty, and every request must fit by itself.

    Raises:
        ValueError: it is empty, a trace line is broken, or a request exceeds context or KV pool.
    """
    pool_tokens = setup.limits.num_blocks * setup.limits.block_size
    if setup.elastic is not None:  # a request's KV may lie on all of them
        gone = len(scenario.faults)  # and once some are lost, on what is left
        pool_tokens = setup.elastic.slots - gone * setup.limits.num_blocks
    most = min(setup.max_model_tokens, pool_tokens)
    return check(scenario.workload, seed, most, prefixes=setup.limits.prefix_caching)


def _context(engine: Engine, architecture: Architecture) -> int:
    context = architecture.max_position_embeddings
    if engine.max_model_len is not None and engine.max_model_len > context:
        raise ValueError(
            f"engine.max_model_len={engine.max_model_len} exceeds the {context} tokens of context "
            f"of {architecture.name}; lower it or set it to null"
        )
    return engine.max_model_len or context


def _limits(scenario: Scenario, architecture: Architecture, device: Device) -> ReplicaLimits:
    engine = scenario.engine
    gpu = scenario.gpu or (scenario.machine.gpu if scenario.machine else None)
    sequences, tokens = batch_limits(engine, gpu)
    computed = tokens
    if is_elastic(scenario):  # the limit is of all instances; one computes no more than it keeps
        computed = min(tokens, engine.num_blocks or -(-tokens // scenario.num_replicas))
    sm_count = (gpu.peak.sm_count if gpu else None) or 0

    def blocks(tp_size: int, pp_size: int) -> int:
        rank = stage_part(tensor_part(architecture, tp_size), pp_size)
        size = scenario.model.dtype.num_bytes
        need = memory_need(engine, (sequences, computed), architecture, rank, size, sm_count)
        block_bytes = engine.block_size * kv_bytes_per_token(
            rank, scenario.model.cache_dtype.num_bytes
        )
        return kv_blocks(engine, device, need, block_bytes)

    try:
        num_blocks = blocks(scenario.tp_size, scenario.pp_size)
    except ValueError as error:
        fitting = _smallest_tp_size(blocks, scenario)
        raise ValueError(
            f"model {architecture.name} in {scenario.model.dtype.value} does not fit: {error}; "
            f"take {fitting}a larger GPU, a smaller dtype or fewer blocks"
        ) from error
    return ReplicaLimits(sequences, tokens, engine.block_size, num_blocks, engine.prefix_caching)


def _smallest_tp_size(blocks: Callable[[int, int], int], scenario: Scenario) -> str:
    """Of the sizes above the one that was tried, the first with which the model fits."""
    for tp_size in range(scenario.tp_size + 1, MAX_TP_SIZE + 1):
        try:
            blocks(tp_size, scenario.pp_size)
        except ValueError:
            continue
        return f"tp_size={tp_size} (the smallest that fits), "
    return ""
