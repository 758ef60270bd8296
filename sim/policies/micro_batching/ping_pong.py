"""Several micro-batches of like size go back and forth between attention and experts.

MegaScale-Infer, section 4.1. Every micro-batch has as many tokens as another to within one request,
so that experts are equally busy, and of equals the one that reads least KV gets the next request,
so that attention is too (section 6: attention packs batches to a target time).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sim.policies.micro_batching.base import MicroBatching, Row


@dataclass(kw_only=True)
class PingPong(MicroBatching):
    """Balanced micro-batches, in order."""

    num_micro_batches: int | None = None
    """How many; null: as the plan says."""

    def __post_init__(self) -> None:
        if self.num_micro_batches is not None and self.num_micro_batches < 1:
            raise ValueError(
                f"policy.micro_batching.num_micro_batches={self.num_micro_batches} must be at "
                "least 1, or null for what the plan says"
            )

    def count(self, planned: int) -> int:
        """As many as were asked for."""
        return self.num_micro_batches or planned

    def split(self, rows: Sequence[Row], count: int) -> list[list[int]]:
        """The largest rows first, each to the micro-batch with the least so far."""
        parts: list[list[int]] = [[] for _ in range(count)]
        loads = [(0, 0, at) for at in range(count)]
        by_size = sorted((-row.tokens, -row.context_tokens, at) for at, row in enumerate(rows))
        for less_tokens, less_context, index in by_size:
            tokens, context, at = min(loads)
            loads[at] = (tokens - less_tokens, context - less_context, at)
            parts[at].append(index)
        return [sorted(part) for part in parts]
