"""What a scenario settles before a run: architecture, limits, cost. Refuses what cannot run."""

from dataclasses import dataclass
from typing import NamedTuple

from hardware_models.schema import Cpu, Gpu, peak_flops_per_s
from sim.costs.base import IterationCost
from sim.costs.fitted import Fitted
from sim.costs.roofline import Roofline
from sim.engine import Engine, ReplicaLimits
from sim.models.architecture import Architecture, load_architecture
from sim.models.parameters import kv_bytes_per_token, weight_bytes
from sim.models.split import require_parallel
from sim.scenario import CostFamily, Scenario
from sim.units import human_bytes
from sim.workload.source import WorkloadTotals, check


@dataclass(frozen=True, slots=True)
class Setup:
    """A replica, ready to run."""

    architecture: Architecture
    limits: ReplicaLimits
    max_model_tokens: int
    """Prompt and answer of one request together, at most."""
    cost: IterationCost
    device: str
    """Name of the GPU or CPU."""
    kv_bytes_per_token: int


def prepare(scenario: Scenario) -> Setup:
    """Derive all that a replica needs.

    Raises:
        ValueError: no hardware, a model that does not fit, or a cost that the hardware lacks.
    """
    architecture = load_architecture(scenario.model.config or scenario.model.name)
    require_parallel(architecture, scenario.tp_size, scenario.pp_size)
    dtype = scenario.model.dtype
    kv_dtype = scenario.model.kv_dtype or dtype
    engine = scenario.engine
    kv_bytes = kv_bytes_per_token(architecture, kv_dtype.num_bytes)
    max_tokens = _context(engine, architecture)
    device = _device(scenario)
    num_blocks = engine.num_blocks
    room = _room(scenario, architecture, device.memory_bytes)
    fitting = int(room // (kv_bytes * engine.block_size))
    if num_blocks is None:
        num_blocks = fitting
    if room < 0 or num_blocks > fitting or num_blocks < 1:
        need = weight_bytes(architecture, dtype.num_bytes)
        blocks = max(num_blocks, 1)
        raise ValueError(
            f"model {architecture.name} in {dtype.value} needs {human_bytes(need)} for weights and "
            f"{human_bytes(blocks * kv_bytes * engine.block_size)} for {blocks} KV blocks; "
            f"{device.name} has {human_bytes(device.memory_bytes)}, of which "
            f"engine.memory_utilization={engine.memory_utilization} and the activations "
            f"{_left(room)}; take a larger GPU, a smaller dtype or fewer blocks"
        )
    limits = ReplicaLimits(
        engine.max_num_seqs, engine.max_num_batched_tokens, engine.block_size, num_blocks
    )
    return Setup(
        architecture=architecture,
        limits=limits,
        max_model_tokens=max_tokens,
        cost=_cost(scenario, architecture, device),
        device=device.name,
        kv_bytes_per_token=kv_bytes,
    )


def _left(room_bytes: float) -> str:
    if room_bytes < 0:
        return f"leave {human_bytes(-room_bytes)} too little for the weights alone"
    return f"leave {human_bytes(room_bytes)} for KV"


def check_workload(scenario: Scenario, setup: Setup, seed: int) -> WorkloadTotals:
    """Read the workload once: it must not be empty, and every request must fit by itself.

    Raises:
        ValueError: it is empty, a trace line is broken, or a request exceeds context or KV pool.
    """
    pool_tokens = setup.limits.num_blocks * setup.limits.block_size
    return check(scenario.workload, seed, min(setup.max_model_tokens, pool_tokens))


def _context(engine: Engine, architecture: Architecture) -> int:
    context = architecture.max_position_embeddings
    if engine.max_model_len is not None and engine.max_model_len > context:
        raise ValueError(
            f"engine.max_model_len={engine.max_model_len} exceeds the {context} tokens of context "
            f"of {architecture.name}; lower it or set it to null"
        )
    return engine.max_model_len or context


class Device(NamedTuple):
    """What computes and holds weights and KV: a GPU, or a CPU with its host memory."""

    name: str
    part: Gpu | Cpu
    memory_bytes: float
    bytes_per_s: float


def _device(scenario: Scenario) -> Device:
    node = scenario.node
    gpu = scenario.gpu or (node.gpu if node else None)
    if gpu is not None:
        peak = gpu.peak
        return Device(gpu.name, gpu, peak.memory_bytes, peak.memory_bandwidth_bytes_per_s)
    if node is None:
        raise ValueError(
            "neither node nor gpu is given and one is needed; try node=a100_80g_x1 or gpu=a100_80g "
            "(`diptych list node` and `diptych list gpu` show all)"
        )
    host = node.host_memory
    if host is None or node.cpu is None:
        raise ValueError(
            f"node {node.name} has no GPU, and no cpu with host_memory; name them in its YAML"
        )
    return Device(node.name, node.cpu, host.memory_bytes, host.bandwidth_bytes_per_s)


def _room(scenario: Scenario, architecture: Architecture, memory_bytes: float) -> float:
    """Bytes that weights and activations leave for KV."""
    engine, size = scenario.engine, scenario.model.dtype.num_bytes
    widest = architecture.hidden_size * 2 + architecture.query_size + 2 * architecture.kv_size
    widest += 2 * (architecture.intermediate_size or architecture.moe_intermediate_size)
    activations = engine.max_num_batched_tokens * widest * size
    logits = engine.max_num_seqs * architecture.vocab_size * 4
    weights = weight_bytes(architecture, size)
    return memory_bytes * engine.memory_utilization - weights - activations - logits


def _cost(scenario: Scenario, architecture: Architecture, device: Device) -> IterationCost:
    if scenario.cost is CostFamily.roofline:
        return Roofline(
            architecture,
            flops_per_s=peak_flops_per_s(device.part, scenario.model.dtype.value),
            bytes_per_s=device.bytes_per_s,
            dtype_bytes=scenario.model.dtype.num_bytes,
            kv_dtype_bytes=(scenario.model.kv_dtype or scenario.model.dtype).num_bytes,
            overhead_s=scenario.engine.iteration_overhead_s,
        )
    node = scenario.node
    fits = node.calibration.models if node is not None and node.calibration else {}
    if scenario.model.name not in fits:
        raise ValueError(
            f"cost=fitted needs a calibration of model {scenario.model.name} on {device.name}; "
            f"there is one of: {', '.join(fits) or 'none'}; run `diptych calibrate` and take "
            "node=this_machine, or take cost=roofline"
        )
    fit, dtype = fits[scenario.model.name], scenario.model.dtype.value
    if fit.dtype != dtype:
        raise ValueError(
            f"model.dtype={dtype} was not calibrated, {fit.dtype} was; take model.dtype={fit.dtype}"
        )
    return Fitted(fit)
