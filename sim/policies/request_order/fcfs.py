"""First come, first served."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sim.policies.request_order.base import RequestOrder, Waiting


@dataclass(kw_only=True)
class Fcfs(RequestOrder):
    """Requests are offered as they came."""

    def order(self, memory: Any, waiting: Sequence[Waiting]) -> Sequence[int]:
        """As they came."""
        del memory
        return range(len(waiting))
