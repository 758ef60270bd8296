"""The highest rate that a system sustains under an SLO, found in few runs.

As LoongServe's artifact reads it off a curve (arXiv 2404.09526): where straight lines between
sampled rates first cross the SLO.
"""

from collections.abc import Callable
from math import exp, inf, isfinite, isnan, log, log1p
from typing import NamedTuple

STEP = 1.4
"""From one rate to the next until the bound lies between two."""


class MaxRate(NamedTuple):
    """What a search found."""

    rate_per_s: float
    """Where the curve first crosses the bound. Infinite where it does not up to the highest rate, 0
    where it exceeds the bound at the lowest already."""
    curve: tuple[tuple[float, float], ...]
    """Every rate that was tried and its value, by rate."""

    @property
    def num_runs(self) -> int:
        """How many rates were tried."""
        return len(self.curve)


def max_rate(
    run: Callable[[float], float],
    start_per_s: float,
    *,
    bound: float = 1.0,
    tolerance: float = 0.03,
    lowest_per_s: float | None = None,
    highest_per_s: float | None = None,
) -> MaxRate:
    """Search from a rate that is near, upwards first or downwards first as its value tells.

    The value need not rise everywhere: of what is sampled, the first crossing is kept. Going up, no
    lower rate that was tried exceeds the bound; a crossing between two tried rates that both keep
    it is not seen.

    Args:
        run: rate in requests per second -> a value, not below 0, that is at most `bound` where the
            SLO is met: latency over SLO, or the share that misses it over the share that may.
            Infinite where nothing can be said but that it is missed.
        start_per_s: the first rate to try; a good guess saves runs.
        bound: what the value must not exceed.
        tolerance: the crossing lies between two tried rates that differ by so much (ratio).
        lowest_per_s: no lower rate is tried; None: a 64th of the start.
        highest_per_s: no higher rate is tried; None: 64 times the start.

    Raises:
        ValueError: rates out of order, a bound or tolerance that is not positive, or a value that
            is not a number or below 0.
    """
    lowest = start_per_s / 64 if lowest_per_s is None else lowest_per_s
    highest = start_per_s * 64 if highest_per_s is None else highest_per_s
    _check(lowest, start_per_s, highest, bound, tolerance)
    values: dict[float, float] = {}

    def exceeds(rate: float) -> bool:
        value = run(rate)
        if isnan(value) or value < 0:
            raise ValueError(
                f"the run at {rate} requests/s gave {value}, which must be a number not below 0; "
                "give infinity where nothing was served"
            )
        values[rate] = value
        return value > bound

    low, high = _bracket(exceeds, lowest, start_per_s, highest)
    if low is not None and high is not None:
        low, high = _narrow(exceeds, values, low, high, bound=bound, tolerance=tolerance)
    curve = tuple(sorted(values.items()))
    if high is None:
        return MaxRate(inf, curve)
    if low is None:
        return MaxRate(0.0, curve)
    return MaxRate(_crossing(low, values[low], high, values[high], bound), curve)


def _bracket(
    exceeds: Callable[[float], bool], lowest: float, start: float, highest: float
) -> tuple[float | None, float | None]:
    """The last rate that keeps the bound and the next one, which does not; None: there is none."""
    rate = start
    if exceeds(rate):
        while rate > lowest:
            above, rate = rate, max(rate / STEP, lowest)
            if not exceeds(rate):
                return rate, above
        return None, rate
    while rate < highest:
        below, rate = rate, min(rate * STEP, highest)
        if exceeds(rate):
            return below, rate
    return rate, None


def _narrow(
    exceeds: Callable[[float], bool],
    values: dict[float, float],
    low: float,
    high: float,
    *,
    bound: float,
    tolerance: float,
) -> tuple[float, float]:
    """Two tried rates as near as the tolerance, of which the lower keeps the bound.

    A guess is tried from both of its sides, half a tolerance away, so that a good one ends the
    search. Where two of them have not halved the interval, its middle is next.
    """
    width = log1p(tolerance)
    spans = [log(high / low)] * 3
    # Where halving has brought it to a rounding above the tolerance, it is near enough.
    while spans[-1] > width * (1 + 1e-9):
        before, span = spans[-3], spans[-1]
        at = 0.5
        if len(spans) == 3 or span <= before / 2:
            guess = _share(values[low], values[high], bound) * span
            # The nearer end is left where it is.
            at = (guess + width / 2 if guess < span / 2 else guess - width / 2) / span
            edge = min(width / span, 0.5) / 2
            at = min(max(at, edge), 1 - edge)
        rate = low * exp(at * span)
        if exceeds(rate):
            high = rate
        else:
            low = rate
        spans.append(log(high / low))
    return low, high


def _share(below: float, above: float, bound: float) -> float:
    """How far from the lower to the higher rate the bound is reached, on logarithmic scales."""
    if not isfinite(above):
        return 0.5
    floor = max(below, bound * 1e-3)
    return log(bound / floor) / log(above / floor)


def _crossing(low: float, below: float, high: float, above: float, bound: float) -> float:
    """Where a straight line reaches the bound; the lower rate where the upper value is infinite."""
    if not isfinite(above):
        return low
    return low + (bound - below) / (above - below) * (high - low)


def _check(lowest: float, start: float, highest: float, bound: float, tolerance: float) -> None:
    if not 0 < lowest <= start <= highest < inf:
        raise ValueError(
            f"lowest_per_s={lowest}, start_per_s={start}, highest_per_s={highest} must be positive "
            "and in this order; correct them, or leave the outer two out"
        )
    for name, value in (("bound", bound), ("tolerance", tolerance)):
        if not 0 < value < inf:
            raise ValueError(f"{name}={value} must be positive and finite; leave it out")
