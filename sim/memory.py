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
    """Of a forward pass over as many tokens as an iteration may have."""
    experts: float
    """Buffers of the experts, which stay allocated."""
    sampling: float
    """Of all requests at once, with the hidden states that it begins from."""
    compiling: float
    reserved: float

    @property
    def total(self) -> float:
        """Of the peak: each of its phases begins when the one before has gone."""
        peak = max(self.activations, self.sampling, self.compiling)
        return self.weights + self.experts + peak + self.reserved


def memory_need(
    engine: Engine, limits: tuple[int, int], whole: Architecture, rank: Architecture, size: int,
    sm_count: int = 0,
) -> MemoryNeed:  # fmt: skip
    """What a rank's memory must hold besides KV, counted by the shapes of tensors.

    Args:
        engine: its rule.
        limits: `max_num_seqs` and `max_num_batched_tokens`.
        whole: the model.
        rank: the part of it that one rank holds; the model itself on one device.
        size: bytes of an element of weights and activations.
        sm_count: SMs of the device.
    """
    sequences, tokens = limits
    # Sampled are copies of the last hidden states, while those of all tokens are still there.
    hidden = (tokens + 2 * sequences) * whole.hidden_size * size
    logits = engine.logit_bytes * sequences + engine.scratch_logit_bytes * min(sequences, sm_count)
    shared = rank.query_size < whole.query_size
    return MemoryNeed(
        weights=weight_bytes(rank, size),
        activations=tokens * _widest(rank) * size,
        experts=tokens * _expert_width(rank) * size,
        sampling=hidden + logits * whole.vocab_size,
        compiling=engine.compile_bytes,
        reserved=engine.reserved_bytes
        + (engine.rank_reserved_bytes if shared else 0)
        + _rotation_bytes(rank, size),
    )


def _widest(rank: Architecture) -> int:
    """Elements a token that are held at once where most are.

    In the MLP: what goes in, both halves where it is gated, and what comes out of the activation,
    beside the residual, what the norm made of it, and the same of the operator before, whose memory
    is not free yet. In attention: queries, keys, values, and what it returns.
    """
    dense = rank.num_sparse_layers < rank.num_layers
    mlp = (3 if rank.gated_mlp else 2) * rank.intermediate_size if dense else 0
    attention = 2 * rank.query_size + 2 * rank.kv_size
    return 4 * rank.hidden_size + max(mlp, attention)


def _expert_width(rank: Architecture) -> int:
    """Elements a token of the two buffers through which experts pass their rows."""
    inner, hidden = rank.moe_intermediate_size, rank.hidden_size
    return rank.experts_per_token * (max(inner, hidden) + max(2 * inner, hidden))


def _rotation_bytes(rank: Architecture, size: int) -> int:
    """The table of the rotary embedding: sines and cosines of every position."""
    return 0 if rank.learned_positions else rank.max_position_embeddings * rank.head_dim * size


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
