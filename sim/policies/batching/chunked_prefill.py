"""Cut prompts into chunks that fill a token budget beside the decodes.

Sarathi-Serve (OSDI 2024), section 4.2; the default scheduler of vLLM's second engine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from sim.engine import ReplicaLimits
from sim.policies.batching.base import (
    DECODE,
    UNTIL_ANY_WAKE,
    UNTIL_FREED,
    Batch,
    Batching,
    ReplicaView,
    Standing,
    preempt_last,
)
from sim.requests import RunningView


@dataclass(kw_only=True)
class ChunkedPrefill(Batching):
    """Decodes first, then begun prompts, then new ones, up to the engine's token budget."""

    first_come_first_served: ClassVar[bool] = True

    chunk_tokens: int | None = None
    """Token budget of an iteration that cuts prompts; null: `engine.max_num_batched_tokens`."""
    whole_prompt: bool = True
    """Admit a request only when the free blocks hold all of its prompt, not just its first chunk
    (vLLM from 0.19 on: `scheduler_reserve_full_isl`). Without it, requests whose prompts do not fit
    together keep pre-empting each other."""

    def __post_init__(self) -> None:
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise ValueError(
                f"chunk_tokens={self.chunk_tokens} must be at least 1, or null for the engine's"
            )

    def next_batch(self, memory: Any, view: ReplicaView) -> Batch:
        """Every decoding request takes a token; prompts share what is left of the budget."""
        del memory
        if not view.waiting and not view.prefilling and view.decode_blocks <= view.free_blocks:
            return DECODE
        victims = preempt_last(view)
        if victims and len(victims) == view.num_running:
            return Batch()  # as `decode_all`: what comes next is KV from elsewhere
        batch = self._fill(view, victims)
        while not batch.decode and not batch.prefill and len(victims) < view.num_running - 1:
            # Begun prompts hold every block and none can go on: the last one starts again later.
            victims = (view.running()[-1 - len(victims)].request_id, *victims)
            batch = self._fill(view, victims)
        return batch

    def steady(self, memory: Any, view: ReplicaView) -> Standing:
        """A queue whose head gets no seat or block stays blocked until something is freed."""
        del memory
        return UNTIL_FREED if view.waiting else UNTIL_ANY_WAKE

    def without_effect(self, limits: ReplicaLimits) -> list[str]:
        """A chunk above the engine's token budget is cut to it."""
        if self.chunk_tokens is None or self.chunk_tokens <= limits.max_num_batched_tokens:
            return []
        return [
            f"chunk_tokens={self.chunk_tokens} is above engine.max_num_batched_tokens="
            f"{limits.max_num_batched_tokens}, which holds; raise the latter"
        ]

    def _fill(self, view: ReplicaView, victims: tuple[int, ...]) -> Batch:
        limits = view.limits
        prefilling, decodes, blocks = _remaining(view, victims)
        budget = min(
            self.chunk_tokens or limits.max_num_batched_tokens, limits.max_num_batched_tokens
        )
        budget -= decodes
        admit: list[int] = []
        prefill: list[tuple[int, int]] = []
        for begun in prefilling:
            tokens, taken = _chunk(begun, budget, blocks, limits.block_size)
            budget, blocks = budget - tokens, blocks - taken
            if tokens:
                prefill.append((begun.request_id, tokens))
        seats = 0 if victims else limits.max_num_seqs - view.num_running
        for request in view.waiting:
            if len(admit) >= seats:
                break
            cached = view.cached_prefix(request)
            left = request.prefill_tokens - cached.tokens
            fresh = RunningView(request.request_id, cached.tokens, left)
            room = blocks - cached.free_blocks
            if self.whole_prompt and _blocks(fresh, left, limits.block_size) > room:
                break
            tokens, taken = _chunk(fresh, budget, room, limits.block_size)
            if not tokens:
                break
            budget, blocks = budget - tokens, room - taken
            admit.append(request.request_id)
            prefill.append((request.request_id, tokens))
        return Batch(tuple(admit), victims, tuple(prefill), decodes > 0)


def _remaining(
    view: ReplicaView, victims: tuple[int, ...]
) -> tuple[Sequence[RunningView], int, int]:
    """Begun prompts, decoding requests and blocks for prompts once the victims are gone."""
    if not victims:
        return view.prefilling, view.num_decoding, view.free_blocks - view.decode_blocks
    block_size = view.limits.block_size
    stay = [request for request in view.running() if request.request_id not in victims]
    prefilling = [request for request in stay if request.prefill_left]
    edges = sum(not r.prefill_left and r.context_tokens % block_size == 0 for r in stay)
    free = view.free_blocks + view.given_up(victims)
    return prefilling, len(stay) - len(prefilling), free - edges


def _chunk(request: RunningView, budget: int, free_blocks: int, block_size: int) -> tuple[int, int]:
    """Tokens of this prefill that budget and blocks allow, and the new blocks that they take."""
    held = -(-request.context_tokens // block_size)
    room = (held + max(free_blocks, 0)) * block_size - request.context_tokens
    tokens = max(min(request.prefill_left, budget, room), 0)
    return tokens, _blocks(request, tokens, block_size)


def _blocks(request: RunningView, tokens: int, block_size: int) -> int:
    """New blocks that so many more tokens of a request take."""
    held = -(-request.context_tokens // block_size)
    return -(-(request.context_tokens + tokens) // block_size) - held
