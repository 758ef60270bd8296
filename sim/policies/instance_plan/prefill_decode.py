"""Prefill on some instances, decode on the others: neither phase waits for the other.

DistServe (OSDI 2024), section 4.3: requests go on where least is outstanding, and the instance that
decodes pulls their KV when it has room, so that the prefill instances' memory is the queue.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from sim.policies.instance_plan.base import FetchView, InstanceGroup, InstancePlan, kv_tokens
from sim.policies.routing.base import RouterView, lightest
from sim.requests import RequestView


@dataclass(kw_only=True)
class PrefillDecode(InstancePlan):
    """The first instances prefill, the others decode."""

    num_prefill: int = 1
    """Instances that prefill and do nothing else."""
    watermark: float = 0.01
    """Share of the KV pool that fetching leaves free, so that the tokens to come have room."""

    def __post_init__(self) -> None:
        if self.num_prefill < 1:
            raise ValueError(f"num_prefill={self.num_prefill} must be at least 1")
        if not 0 <= self.watermark < 1:
            raise ValueError(f"watermark={self.watermark} must be in [0, 1); try 0.01")

    def groups(self, memory: Any, num_instances: int) -> tuple[InstanceGroup, ...]:
        """Each instance is a group of its own."""
        del memory
        if num_instances <= self.num_prefill:
            raise ValueError(
                f"num_prefill={self.num_prefill} of num_replicas={num_instances} leaves no "
                f"instance that decodes; take num_replicas={self.num_prefill + 1} or more"
            )
        return tuple(
            InstanceGroup((at,), at < self.num_prefill, at >= self.num_prefill)
            for at in range(num_instances)
        )

    def hand_over(self, memory: Any, request: RequestView, view: RouterView) -> int:
        """Where the fewest tokens are outstanding; of several, the first."""
        del memory, request
        return lightest(view.outstanding_tokens, view.live)

    def fetch(self, memory: Any, handed: Sequence[RequestView], view: FetchView) -> int:
        """First come, first served, while there are seats, and blocks above the watermark."""
        del memory
        limits = view.limits
        seats = limits.max_num_seqs - view.num_running - view.num_fetching
        blocks = view.free_blocks
        if view.num_running or view.num_fetching:
            blocks -= ceil(self.watermark * limits.num_blocks)
        count = 0
        for request in handed:
            blocks -= limits.blocks_for(kv_tokens(request))
            if count == seats or blocks < 0:
                break
            count += 1
        return count
