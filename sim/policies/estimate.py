"""What a policy may know about time: an estimate that the scenario hands to both panels."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np


class PrefillEstimator(Protocol):
    """Seconds of a prefill."""

    def seconds(self, cached_tokens: int, new_tokens: int) -> float:
        """To compute so many new tokens behind so many cached ones, alone in a batch."""
        ...


class PrefillProfile:
    """Prefill times on a grid of cached and new tokens, interpolated bilinearly (RAGCache 5.1)."""

    def __init__(
        self,
        cached_tokens: Sequence[int],
        new_tokens: Sequence[int],
        seconds: Sequence[Sequence[float]],
    ) -> None:
        """Take over a measured grid.

        Args:
            cached_tokens: rows of the grid, increasing.
            new_tokens: columns of the grid, increasing.
            seconds: of each row, one for each column.

        Raises:
            ValueError: fewer than two rows or columns, not increasing, or another shape.
        """
        for name, axis in (("cached_tokens", cached_tokens), ("new_tokens", new_tokens)):
            if len(axis) < 2 or any(a >= b for a, b in pairwise(axis)):
                raise ValueError(f"{name}={list(axis)} must be two or more and increase")
        shape = (len(cached_tokens), len(new_tokens))
        if np.shape(seconds) != shape:
            raise ValueError(f"seconds have shape {np.shape(seconds)} and must have {shape}")
        self._cached, self._new = list(cached_tokens), list(new_tokens)
        self._seconds = [list(row) for row in seconds]

    @classmethod
    def measured(
        cls,
        prefill_s: Callable[[int, int], float],
        max_tokens: int,
        points: int = 17,
    ) -> "PrefillProfile":
        """Profile a cost on a grid up to a context: evenly in cached, by halves in new tokens.

        Args:
            prefill_s: seconds of (cached, new) tokens.
            max_tokens: longest context.
            points: rows of the grid.
        """
        cached = sorted({round(at * max_tokens / (points - 1)) for at in range(points)})
        new = sorted({max(max_tokens >> halves, 1) for halves in range(points)} | {0})
        rows = [[prefill_s(before, after) if after else 0.0 for after in new] for before in cached]
        return cls(cached, new, rows)

    def seconds(self, cached_tokens: int, new_tokens: int) -> float:
        """Interpolated inside the grid; outside, its outermost cells go on."""
        row, up = _cell(self._cached, cached_tokens)
        column, right = _cell(self._new, new_tokens)
        low, high = self._seconds[row], self._seconds[row + 1]
        at_low = low[column] + right * (low[column + 1] - low[column])
        at_high = high[column] + right * (high[column + 1] - high[column])
        return at_low + up * (at_high - at_low)


def _cell(axis: list[int], value: int) -> tuple[int, float]:
    """The cell of a grid axis that a value is in, and how far into it."""
    index = min(max(bisect_right(axis, value) - 1, 0), len(axis) - 2)
    return index, (value - axis[index]) / (axis[index + 1] - axis[index])
