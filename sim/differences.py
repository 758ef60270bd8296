# pyright: basic
"""How sure is a difference between two results? Intervals of B - A over their seeds."""

from collections.abc import Sequence

import numpy as np

from sim.result import Figure, interval


def difference(ones: Sequence[float], others: Sequence[float], *, paired: bool) -> Figure:
    """Mean of B - A with half of its 95 % interval.

    Args:
        ones: a figure of A, one value a seed.
        others: the same figure of B.
        paired: both runs saw the same requests, seed by seed. What the requests differ in then
            drops out of the difference (common random numbers); else Welch's interval is taken.
    """
    if paired:
        return interval([b - a for a, b in zip(ones, others, strict=True)])
    mean = float(np.mean(others) - np.mean(ones))
    if min(len(ones), len(others)) < 2:
        return Figure(mean, None)
    from scipy.special import stdtrit

    parts = np.array([np.var(values, ddof=1) / len(values) for values in (ones, others)])
    if not parts.sum():
        return Figure(mean, 0.0)
    freedom = parts.sum() ** 2 / (parts**2 / [len(ones) - 1, len(others) - 1]).sum()
    return Figure(mean, float(stdtrit(freedom, 0.975)) * float(parts.sum()) ** 0.5)
