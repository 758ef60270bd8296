"""Bootstrap intervals of repeated runs."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 1000


def two_stage(
    repeats: Sequence[Sequence[Floats]], statistic: Callable[[Floats], float], seed: int
) -> tuple[float, float]:
    """The 95 % bootstrap interval of a statistic over runs: runs are drawn, then their requests.

    Requests of one run share its queue and its minute of the machine, so drawing requests alone
    would claim too much; few requests say little of a high percentile, so drawing repeats alone
    would as well.

    Args:
        repeats: for each run, what each request brings, its values along the last axis.
        statistic: of all drawn values, joined along their last axis.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    found: list[float] = []
    for _ in range(RESAMPLES):
        drawn: list[Floats] = []
        for repeat in rng.integers(len(repeats), size=len(repeats)):
            rows = repeats[repeat]
            drawn += [rows[row] for row in rng.integers(len(rows), size=len(rows))]
        found.append(statistic(np.concatenate(drawn, axis=-1)))
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)
