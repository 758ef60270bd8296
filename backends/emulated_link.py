"""A link that is not there: deliveries are held back as long as a slower one would take.

Any ratio of communication to computation can so be tried on one machine. Whoever waits sleeps, and
leaves the core to others. What was measured over such a link is labelled emulated.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from math import isfinite

import torch
from torch import Tensor


@dataclass(kw_only=True)
class EmulatedLink:
    """One way out of every rank, with a latency and a bandwidth; the ranks share one clock.

    A message leaves when those before it to the same rank have left. It is there after `latency_s`
    + bytes / `bandwidth_bytes_per_s`.
    """

    latency_s: float
    """Seconds of an empty message."""
    bandwidth_bytes_per_s: float
    """Bytes per second in one direction."""
    label: str = "emulated"
    """Shown beside what was measured over this link."""
    _free_s: dict[int, float] = field(default_factory=dict[int, float], repr=False)

    def __post_init__(self) -> None:
        if not (isfinite(self.latency_s) and self.latency_s >= 0):
            raise ValueError(f"latency_s={self.latency_s} must be finite and not negative")
        if not self.bandwidth_bytes_per_s > 0:
            raise ValueError(
                f"bandwidth_bytes_per_s={self.bandwidth_bytes_per_s} must be above 0; it may be inf"
            )

    def stamp(self, tensor: Tensor, to: int) -> Tensor:
        """The instant at which a message of this tensor is due, float64 [1], to travel before it.

        The link to that rank is taken until the message has left.
        """
        size = tensor.numel() * tensor.element_size()
        start_s = max(time.monotonic(), self._free_s.get(to, 0.0))
        self._free_s[to] = start_s + size / self.bandwidth_bytes_per_s
        return torch.tensor([self._free_s[to] + self.latency_s], dtype=torch.float64)

    def due_s(self, operation: str, tensor: Tensor, ranks: int) -> float:
        """When a collective could be over if all ranks had handed in their tensor now.

        It is over at the latest of these instants of its ranks.
        """
        size = tensor.numel() * tensor.element_size()
        return time.monotonic() + self.seconds(operation, size, ranks)

    def seconds(self, operation: str, size_bytes: int, ranks: int) -> float:
        """Seconds of a collective over this link, all ranks beginning at once.

        Rings for all-reduce, reduce-scatter and all-gather, a tree for broadcast, pairwise exchange
        for all-to-all (Thakur et al., 2005).

        Args:
            operation: see `backends.collectives.Sent`.
            size_bytes: payload of one rank.
            ranks: in the group.
        """
        others, share = ranks - 1, size_bytes / ranks
        steps, moved = {
            "all_reduce": (2 * others, 2 * others * share),
            "reduce_scatter": (others, others * share),
            "all_gather": (others, others * size_bytes),
            "all_to_all": (others, others * share),
            "broadcast": ((ranks - 1).bit_length(), (ranks - 1).bit_length() * size_bytes),
        }[operation]
        return steps * self.latency_s + moved / self.bandwidth_bytes_per_s

    @staticmethod
    def deliver(tensor: Tensor, due_s: float) -> Tensor:
        """The tensor, not before `due_s`."""
        while (left_s := due_s - time.monotonic()) > 0:
            time.sleep(left_s)
        return tensor
