"""How often an item is among the first few drawn without replacement."""

from math import lgamma, log

import numpy as np
from numpy.typing import NDArray

STEP = 0.1
"""Of the trapezoidal rule, in the logarithm of time. The integrands are analytic and die out at
both ends, so that its error is far below rounding."""


def inclusion_probabilities(weights: NDArray[np.float64], top_k: int) -> NDArray[np.float64]:
    """The probability that each item is among `top_k` successive draws without replacement.

    Give item e a clock that rings after an exponential time of rate w_e: the order in which the
    clocks ring is that of the draws. So e is among the first k if fewer than k others ring before
    it, which is the integral of w_e exp(-w_e t) P(fewer than k others by t) over all times t.

    Args:
        weights: of each item, positive.
        top_k: draws, from 1 to the number of items.

    Returns:
        float64 [items]; they add up to top_k.
    """
    num_items = len(weights)
    if top_k == num_items:
        return np.ones(num_items)
    rates = weights / weights.sum()
    # Later, all but k - 1 of the others would have to ring so late, and the slowest hardly do.
    slowest = float(np.sort(rates)[: num_items - top_k].sum())
    ways = lgamma(num_items + 1) - lgamma(top_k + 1) - lgamma(num_items - top_k + 1)
    # Before 1e-18 of the mean time of the first ring nothing is lost that a float would hold.
    times = np.exp(np.arange(log(1e-18), log((ways + 45) / slowest), STEP))
    parts = np.array_split(times, -(-len(times) // 128))
    return sum((_integrals(rates, top_k, part) for part in parts), np.zeros(num_items))


def _integrals(
    rates: NDArray[np.float64], top_k: int, times: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The part of every item's integral that lies at some of the times."""
    waits = np.exp(-rates[:, None] * times)
    rings = -np.expm1(-rates[:, None] * times)
    # Row e: of the items before e, the probability that exactly 0, 1, ..., k - 1 have rung.
    before = np.zeros((len(rates) + 1, top_k, len(times)))
    before[0, 0] = 1.0
    for item in range(len(rates)):
        before[item + 1] = _with_one_more(before[item], waits[item], rings[item])
    behind = before[0]
    found = np.empty(len(rates))
    for item in reversed(range(len(rates))):
        # i before it and at most k - 1 - i behind it.
        fewer = (before[item] * behind.cumsum(axis=0)[::-1]).sum(axis=0)
        found[item] = STEP * float((rates[item] * times * waits[item]) @ fewer)
        behind = _with_one_more(behind, waits[item], rings[item])
    return found


def _with_one_more(
    counts: NDArray[np.float64], wait: NDArray[np.float64], ring: NDArray[np.float64]
) -> NDArray[np.float64]:
    more = counts * wait
    more[1:] += counts[:-1] * ring
    return more
