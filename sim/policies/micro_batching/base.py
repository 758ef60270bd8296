"""Micro-batching: into which parts an attention node's batch is split, and in which order they go.

While the experts compute one part, attention computes another (MegaScale-Infer, section 4.1).
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sim.policies.base import Policy


class Row(Protocol):
    """A request's share of a batch on one attention node. Read only."""

    @property
    def tokens(self) -> int:
        """To compute: 1 for a decode."""
        ...

    @property
    def context_tokens(self) -> int:
        """Whose KV they read, themselves included."""
        ...


@dataclass(kw_only=True)
class MicroBatching(Policy):
    """Decides once an iteration on every attention node, of its own batch alone."""

    @abstractmethod
    def count(self, planned: int) -> int:
        """Micro-batches of every iteration, on all nodes alike; experts wait for so many a layer.

        Args:
            planned: what the deployment's plan names.
        """

    @abstractmethod
    def split(self, rows: Sequence[Row], count: int) -> list[list[int]]:
        """The rows of each micro-batch, by their place in `rows`; first micro-batches go first.

        Args:
            rows: of the node's batch; fewer than `count` leave some micro-batches empty.
            count: micro-batches.
        """


def checked_split(rule: MicroBatching, rows: Sequence[Row], count: int) -> list[list[int]]:
    """What a rule splits a batch into, for both panels.

    Raises:
        ValueError: it loses a row, has one twice, or makes another number of micro-batches.
    """
    parts = rule.split(rows, count)
    if len(parts) != count or sorted(row for part in parts for row in part) != [*range(len(rows))]:
        raise ValueError(
            f"policy {type(rule).__name__}: {parts} must be {count} lists that hold each of the "
            f"{len(rows)} rows once; mend the policy"
        )
    return parts
