"""Attention of a fixed number of decoding requests as a function of the tokens that they read."""

from bisect import bisect_right
from collections.abc import Callable, Sequence

import numpy as np

from sim.costs.base import SHORT_RUN


class Curve:
    """Piecewise linear, the outer pieces going on for ever; exact to the bit in both forms."""

    def __init__(self, knots: Sequence[float], values: Sequence[float], last_slope: float) -> None:
        """Take the corners.

        Args:
            knots: tokens of all contexts together, increasing, at least one.
            values: seconds at each; before the first knot the first value holds.
            last_slope: seconds for each token beyond the last knot.
        """
        self.knots = list(knots)
        # Piece i ends at knot i; it starts at the knot before, the first one is flat.
        self._starts = [self.knots[0], *self.knots]
        self._values = [values[0], *values]
        gaps = zip(self.knots, self.knots[1:], values, values[1:], strict=False)
        self._slopes = [0.0, *((v1 - v0) / (k1 - k0) for k0, k1, v0, v1 in gaps), last_slope]

    @classmethod
    def through(cls, knots: Sequence[float], seconds: Callable[[float], float]) -> "Curve":
        """The curve of a function, exact at the knots; beyond them it goes on as to twice the last.

        Args:
            knots: where to ask, increasing.
            seconds: of so many tokens.
        """
        values = [seconds(knot) for knot in knots]
        last = knots[-1]
        return cls(knots, values, (seconds(2 * last) - values[-1]) / last)

    def at(self, context: float) -> float:
        """Seconds when `context` tokens are read."""
        piece = bisect_right(self.knots, context)
        return self._values[piece] + (context - self._starts[piece]) * self._slopes[piece]

    def run(self, fixed_s: float, first: int, step: int, count: int) -> list[float]:
        """`fixed_s + at(first + i * step)` of each i below `count`.

        A stretch within one piece needs no search; most do.
        """
        stop = first + step * count
        piece = bisect_right(self.knots, first)
        if piece == bisect_right(self.knots, stop - step):
            value, start, slope = self._values[piece], self._starts[piece], self._slopes[piece]
            if count < SHORT_RUN:
                contexts = range(first, stop, step)
                return [fixed_s + (value + (c - start) * slope) for c in contexts]
            contexts = np.arange(first, stop, step)
            return (fixed_s + (value + (contexts - start) * slope)).tolist()
        contexts = np.arange(first, stop, step)
        pieces = np.searchsorted(self.knots, contexts, side="right")
        starts, values, slopes = map(np.array, (self._starts, self._values, self._slopes))
        return (fixed_s + (values[pieces] + (contexts - starts[pieces]) * slopes[pieces])).tolist()
