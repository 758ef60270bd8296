"""The whole batch at once: attention waits while the experts compute, and they wait for it."""

from collections.abc import Sequence
from dataclasses import dataclass

from sim.policies.micro_batching.base import MicroBatching, Row


@dataclass(kw_only=True)
class WholeBatch(MicroBatching):
    """One micro-batch."""

    def count(self, planned: int) -> int:
        """One."""
        del planned
        return 1

    def split(self, rows: Sequence[Row], count: int) -> list[list[int]]:
        """All rows, in order."""
        del count
        return [list(range(len(rows)))]
