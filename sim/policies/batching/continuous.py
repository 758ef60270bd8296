"""Iteration-level batching, whole prompts first; KV in blocks, pre-emption by recomputation.

Orca (OSDI 2022), section 3.1, with the scheduler of vLLM's first engine (SOSP 2023, section 4.5).
"""

from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar

from sim.policies.batching.base import (
    UNTIL_ANY_WAKE,
    UNTIL_FREED,
    Batch,
    Batching,
    ReplicaView,
    Standing,
    decode_all,
    whole_prompts,
)


@dataclass(kw_only=True)
class Continuous(Batching):
    """Waiting prompts run first, as a batch of their own; running requests decode otherwise."""

    first_come_first_served: ClassVar[bool] = True

    watermark: float = 0.01
    """Share of the KV blocks that admission leaves free while others run, 0 to 1: without it a
    newcomer is soon pre-empted."""

    def __post_init__(self) -> None:
        if not 0 <= self.watermark < 1:
            raise ValueError(f"watermark={self.watermark} must be in [0, 1); try 0.01")

    def next_batch(self, memory: Any, view: ReplicaView) -> Batch:
        """Prefill what can be admitted; when nothing can, one token for everyone."""
        del memory
        if view.waiting:
            batch = whole_prompts(view, ceil(self.watermark * view.limits.num_blocks))
            if batch.admit:
                return batch
        return decode_all(view)

    def steady(self, memory: Any, view: ReplicaView) -> Standing:
        """A queue whose head does not fit stays blocked until something is freed."""
        del memory
        return UNTIL_FREED if view.waiting else UNTIL_ANY_WAKE
