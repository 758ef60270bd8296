"""A cubic through points that does not overshoot between them: PCHIP, as scipy computes it.

Fritsch and Butland, "A method for constructing local monotone piecewise cubic interpolants" (SIAM
J. Sci. Stat. Comput. 1984). Written out, as importing scipy's takes longer than reading tables.
"""

import numpy as np
from numpy.typing import ArrayLike


def monotone_cubic(x: ArrayLike, y: ArrayLike) -> list[list[float]]:
    """Coefficients a, b, c, d of ((a t + b) t + c) t + d with t = x - x[i], for every interval i.

    Args:
        x: at least two, strictly increasing.
        y: as many.
    """
    at, height = np.asarray(x, np.float64), np.asarray(y, np.float64)
    step = np.diff(at)
    secant = np.diff(height) / step
    slope = np.full(len(at), secant[0])
    if len(at) > 2:
        before, after = secant[:-1], secant[1:]
        w1, w2 = 2 * step[1:] + step[:-1], step[1:] + 2 * step[:-1]
        climbs = before * after > 0  # else an extremum lies at the point: level there
        level = np.zeros_like(before)
        np.divide((w1 + w2) * before * after, w1 * after + w2 * before, out=level, where=climbs)
        slope[1:-1] = level
        slope[0] = _end(step[0], step[1], secant[0], secant[1])
        slope[-1] = _end(step[-1], step[-2], secant[-1], secant[-2])
    bend = (slope[:-1] + slope[1:] - 2 * secant) / step
    columns = [bend / step, (secant - slope[:-1]) / step - bend, slope[:-1], height[:-1]]
    coefficients: list[list[float]] = np.stack(columns, axis=1).tolist()
    return coefficients


def _end(near: float, far: float, secant: float, next_secant: float) -> float:
    """The slope at an end, from three points, kept in the direction of the first interval."""
    slope = ((2 * near + far) * secant - near * next_secant) / (near + far)
    if slope * secant <= 0:
        return 0.0
    return 3 * secant if secant * next_secant < 0 and abs(slope) > 3 * abs(secant) else slope
