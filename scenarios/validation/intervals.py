"""Bootstrap intervals for repeated runs: repeats are drawn, and requests within each."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Sample = NDArray[np.float64]
"""What one request brings: its values, along the last axis."""

RESAMPLES = 1000


def two_stage(
    repeats: Sequence[Sequence[Sample]], statistic: Callable[[Sample], float], seed: int
) -> tuple[float, float]:
    """The 95 % percentile interval of a statistic over repeated runs.

    Requests of one run share its queue and its minute of the machine, so drawing requests alone
    would claim too much: each resample draws runs, then requests within each drawn run.

    Args:
        repeats: for each run, the samples of its requests.
        statistic: of all drawn samples, joined along their last axis.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    found = np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        drawn: list[Sample] = []
        for repeat in rng.integers(len(repeats), size=len(repeats)):
            rows = repeats[repeat]
            drawn += [rows[row] for row in rng.integers(len(rows), size=len(rows))]
        found[index] = statistic(np.concatenate(drawn, axis=-1))
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)
