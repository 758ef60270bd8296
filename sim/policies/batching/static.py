"""Run a batch to its end before the next one starts: the baseline of every serving paper.

Orca (OSDI 2022), section 2, calls it request-level scheduling.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from sim.policies.batching.base import (
    UNTIL_FREED,
    Batch,
    Batching,
    ReplicaView,
    Standing,
    decode_all,
    whole_prompts,
)


@dataclass(kw_only=True)
class Static(Batching):
    """Requests that arrive in mid-batch wait until the last one of the batch has finished."""

    first_come_first_served: ClassVar[bool] = True

    def next_batch(self, memory: Any, view: ReplicaView) -> Batch:
        """Decode while anything runs; else start what fits, first come, first served."""
        del memory
        if not view.num_running:
            return whole_prompts(view)
        return decode_all(view)

    def steady(self, memory: Any, view: ReplicaView) -> Standing:
        """Arrivals change nothing in mid-batch."""
        del memory, view
        return UNTIL_FREED
