"""Bootstrap intervals of repeated runs."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 2000


def over_repeats(values: Sequence[float], seed: int) -> tuple[float, float, float]:
    """Median of a figure over repeats of the same requests, and its 95 % bootstrap interval.

    The repeats differ by what the machine did meanwhile, and so does the interval. With few repeats
    it spans all of them.

    Args:
        values: one a repeat.
        seed: of the draws.
    """
    found = np.array(values)
    low, high = _bootstrap(len(found), lambda drawn: float(np.median(found[drawn])), seed)
    return float(np.median(found)), low, high


def over_requests(rows: Sequence[Floats], seed: int) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean of all values, drawn request by request.

    Args:
        rows: the values of each request.
        seed: of the draws.
    """
    sums = np.array([row.sum() for row in rows])
    counts = np.array([len(row) for row in rows])
    return _bootstrap(len(rows), lambda drawn: sums[drawn].sum() / counts[drawn].sum(), seed)


def _bootstrap(
    count: int, statistic: Callable[[NDArray[np.int64]], float], seed: int
) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    found = [statistic(rng.integers(count, size=count)) for _ in range(RESAMPLES)]
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)
