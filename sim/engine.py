"""The serving engine that a replica models: its limits, its memory rule and its overhead."""

from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple


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

    def block_tokens(self, tokens: int) -> int:
        """Tokens that the blocks have room for that hold `tokens` tokens of one request."""
        return self.blocks_for(tokens) * self.block_size


@dataclass(kw_only=True)
class Engine:
    """Limits that a replica shares with every policy. None means: follows from model and memory."""

    name: str = "diptych"
    """The engine that is modelled; shown in results."""
    default_batching: str | None = None
    """The batching policy that it starts with; null: that of the study."""
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
    batches_in_flight: int | None = None
    """Batches that a replica of `pp_size` stages has under way at once, each with its share of the
    KV pool and of the seats. None: one a stage. 1: a stage waits while the others compute."""
    schedules_ahead: bool = False
    """The simulated replica decides each iteration when the one before it begins (vLLM's
    `async_scheduling`): a request that comes in between waits one iteration longer."""
    logit_bytes: float = 4.0
    """Memory that sampling takes at its peak, for each request and word of the vocabulary."""
    scratch_logit_bytes: float = 0.0
    """The same for those requests only that the SMs filter at once, one each."""
    compile_bytes: int = 0
    """Memory that the compilation of the model takes at its peak, where the engine sizes its pool
    while it compiles. 0: it starts with kernels that were compiled before."""
    reserved_bytes: int = 0
    """Memory that libraries and CUDA graphs take on every device beside what is computed."""
    rank_reserved_bytes: int = 0
    """The same for communication, where several ranks share the model."""

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"engine.block_size={self.block_size} must be at least 1")
        for field in ("max_num_seqs", "max_num_batched_tokens", "num_blocks", "max_model_len",
                      "batches_in_flight"):  # fmt: skip
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
        for field in (
            "logit_bytes", "scratch_logit_bytes", "compile_bytes", "reserved_bytes",
            "rank_reserved_bytes",
        ):  # fmt: skip
            value = getattr(self, field)
            if not (isfinite(value) and value >= 0):
                raise ValueError(f"engine.{field}={value} must not be negative; give bytes")
        if self.max_num_seqs is not None and self.max_num_batched_tokens is not None:
            require_room_for_all(self.max_num_seqs, self.max_num_batched_tokens)


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
