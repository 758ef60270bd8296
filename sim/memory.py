"""What a device's memory holds: weights, activations, what an engine reserves, and KV blocks."""

from dataclasses import dataclass
from typing import NamedTuple

from hardware_models.schema import Cpu, Gpu, Node
from sim.engine import Engine
from sim.models.architecture import Architecture
from sim.models.parameters import weight_bytes
from sim.units import human_bytes


class Device(NamedTuple):
    """What computes and holds weights and KV: a GPU, or a CPU with its host memory."""

    name: str
    part: Gpu | Cpu
    memory_bytes: float
    bytes_per_s: float


def device_of(node: Node | None, gpu: Gpu | None) -> Device:
    """The device that one rank of a replica runs on.

    Raises:
        ValueError: there is none.
    """
    gpu = gpu or (node.gpu if node else None)
    if gpu is not None:
        return Device(gpu.name, gpu, gpu.usable_memory_bytes, gpu.peak.memory_bandwidth_bytes_per_s)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeed:
    """Bytes of one rank of a replica, without its KV."""

    weights: float
    activations: float
    sampling: float
    reserved: int

    @property
    def total(self) -> float:
        """Of an iteration's peak: sampling begins when the activations are gone."""
        return self.weights + max(self.activations, self.sampling) + self.reserved


def memory_need(
    engine: Engine, limits: tuple[int, int], whole: Architecture, rank: Architecture, size: int
) -> MemoryNeed:
    """What a rank's memory must hold besides KV.

    Args:
        engine: its rule.
        limits: `max_num_seqs` and `max_num_batched_tokens`.
        whole: the model.
        rank: the part of it that one rank holds; the model itself on one device.
        size: bytes of an element of weights and activations.
    """
    sequences, tokens = limits
    widest = rank.hidden_size * 2 + rank.query_size + 2 * rank.kv_size
    widest += 2 * (rank.intermediate_size or rank.moe_intermediate_size)
    shared = rank.query_size < whole.query_size
    return MemoryNeed(
        weights=weight_bytes(rank, size),
        activations=tokens * widest * size,
        sampling=engine.logit_bytes * sequences * whole.vocab_size,
        reserved=engine.reserved_bytes + (engine.rank_reserved_bytes if shared else 0),
    )


def kv_blocks(engine: Engine, device: Device, need: MemoryNeed, block_bytes: int) -> int:
    """Blocks of the pool: as many as were asked for, else as many as fit.

    Raises:
        ValueError: weights, or so many blocks, do not fit; says by how much.
    """
    room = device.memory_bytes * engine.memory_utilization - need.total
    fitting = int(room // block_bytes)
    num_blocks = fitting if engine.num_blocks is None else engine.num_blocks
    if room < 0 or num_blocks > fitting or num_blocks < 1:
        blocks = max(num_blocks, 1)
        raise ValueError(
            f"{human_bytes(need.weights)} for weights and {human_bytes(blocks * block_bytes)} for "
            f"{blocks} KV blocks are needed; {device.name} has {human_bytes(device.memory_bytes)}, "
            f"of which engine.memory_utilization={engine.memory_utilization}, the activations and "
            f"sampling {_left(room)}"
        )
    return num_blocks


def _left(room_bytes: float) -> str:
    if room_bytes < 0:
        return f"leave {human_bytes(-room_bytes)} too little for the weights alone"
    return f"leave {human_bytes(room_bytes)} for KV"
