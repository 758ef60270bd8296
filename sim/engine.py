"""The serving engine that a replica models: its limits, its memory rule and its overhead."""

from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

from hardware_models.schema import Gpu

GIB = 2**30


class ReplicaLimits(NamedTuple):
    """The limits that bind every batching policy, settled before a run."""

    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int
    prefix_caching: bool = False
    """Whether full prompt blocks stay cached and are shared."""

    def blocks_for(self, tokens: int) -> int:
        """KV blocks that hold `tokens` tokens of one request."""
        return -(-tokens // self.block_size)


@dataclass(kw_only=True)
class Engine:
    """Limits that a replica shares with every policy. None means: follows from model and memory."""

    name: str = "diptych"
    """The engine that is modelled; shown in results."""
    framework: str = "vllm"
    """Serving framework whose kernels `cost=profiled` reads the measurements of."""
    framework_version: str | None = None
    """Its version; null: the newest that was measured."""
    max_num_seqs: int | None = 256
    """Requests that may run at once. None: as the engine chooses for the device."""
    max_num_batched_tokens: int | None = 2048
    """Tokens of one iteration. A whole prompt above it runs alone where prompts are not cut.
    None: as the engine chooses for the device."""
    block_size: int = 16
    """Tokens in a KV block."""
    prefix_caching: bool = False
    """Whether full blocks of prompts stay cached and are shared by requests with that prefix."""
    num_blocks: int | None = None
    """KV blocks of the pool. None: what weights and activations leave of the memory."""
    memory_utilization: float = 0.9
    """Share of the device memory that the engine may take, 0 to 1."""
    max_model_len: int | None = None
    """Prompt and answer together, in tokens. None: the model's context."""
    iteration_overhead_s: float = 0.0
    """Scheduling and launch time that every iteration adds, in seconds."""
    logit_bytes: float = 4.0
    """Memory that sampling takes at its peak, for each request and word of the vocabulary."""
    reserved_bytes: int = 0
    """Memory that libraries and CUDA graphs take on every device beside what is computed."""
    rank_reserved_bytes: int = 0
    """The same for communication, where several ranks share the model."""

    def __post_init__(self) -> None:
        for field in ("block_size",):
            value = getattr(self, field)
            if value < 1:
                raise ValueError(f"engine.{field}={value} must be at least 1")
        for field in ("max_num_seqs", "max_num_batched_tokens", "num_blocks", "max_model_len"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"engine.{field}={value} must be at least 1, or null to derive it")
        if not 0 < self.memory_utilization <= 1:
            raise ValueError(
                f"engine.memory_utilization={self.memory_utilization} must be in (0, 1]; try 0.9"
            )
        overhead_s = self.iteration_overhead_s
        if not (isfinite(overhead_s) and overhead_s >= 0):
            raise ValueError(
                f"engine.iteration_overhead_s={overhead_s} must not be negative "
                "and must be finite; give seconds, such as 1e-4"
            )
        for field in ("logit_bytes", "reserved_bytes", "rank_reserved_bytes"):
            value = getattr(self, field)
            if not (isfinite(value) and value >= 0):
                raise ValueError(f"engine.{field}={value} must not be negative; give bytes")
        if self.max_num_seqs is not None and self.max_num_batched_tokens is not None:
            require_room_for_all(self.max_num_seqs, self.max_num_batched_tokens)


VLLM_V1 = Engine(
    name="vllm_v1",
    max_num_seqs=None,
    max_num_batched_tokens=None,
    # What the GPU waits for between two iterations although the next one is scheduled ahead: the
    # copies of inputs and of sampled tokens, the launches around the CUDA graph.
    # `benchmarks/real_requests.py` says how it was found and what another value would give.
    iteration_overhead_s=6e-4,
    # Peak of a dummy sampling step, vLLM 0.11 on H100: 4.76 GiB for 1,024 sequences of 128,256
    # words, 5.56 and 5.64 GiB for 151,936 words ("vLLM Empirical Memory Profiling Results").
    logit_bytes=38.7,
    # Non-torch memory in the same table: 0.13 GiB on one rank, 0.54 GiB on two.
    reserved_bytes=139586437,
    rank_reserved_bytes=440234148,
)
"""vLLM's second engine (0.11 to 0.19): prompts in chunks, decodes first; what a server starts with."""

ENGINES = {"diptych": Engine(), "vllm_v1": VLLM_V1}
"""Every engine profile by its name on the command line."""


def batch_limits(engine: Engine, gpu: Gpu | None) -> tuple[int, int]:
    """(`max_num_seqs`, `max_num_batched_tokens`), those left open as vLLM's server sets them.

    It takes 1,024 sequences and 8,192 tokens on devices of 70 GiB and more, but for the A100, and
    256 and 2,048 on others (`EngineArgs.get_batch_defaults`).

    Raises:
        ValueError: one limit was given and the other one does not fit it.
    """
    large = (
        gpu is not None
        and gpu.peak.memory_bytes >= 70 * GIB
        and not gpu.name.lower().startswith("a100")
    )
    sequences = engine.max_num_seqs or (1024 if large else 256)
    tokens = engine.max_num_batched_tokens or (8192 if large else 2048)
    require_room_for_all(sequences, tokens)
    return sequences, tokens


def require_room_for_all(max_num_seqs: int, max_num_batched_tokens: int) -> None:
    """Every running request takes a token of an iteration.

    Raises:
        ValueError: there are not as many tokens as requests.
    """
    if max_num_batched_tokens < max_num_seqs:
        raise ValueError(
            f"engine.max_num_batched_tokens={max_num_batched_tokens} must be at least "
            f"engine.max_num_seqs={max_num_seqs}: every running request takes a token; "
            "raise the former or lower the latter"
        )
