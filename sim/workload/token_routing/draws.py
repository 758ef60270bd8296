"""Distinct experts for many tokens at once, drawn one after another without replacement."""

import numpy as np
from numpy.typing import NDArray

from sim.workload.mixing import mixed
from sim.workload.token_routing.base import Tokens

Whole = NDArray[np.int64]


def token_keys(seed: int, layer: int, tokens: Tokens) -> NDArray[np.uint64]:
    """64 random bits for every token, which depend on (seed, layer, request, position) only.

    Raises:
        ValueError: the seed is negative.
    """
    if seed < 0:
        raise ValueError(f"seed={seed} must not be negative; use 0 or more")
    key = mixed(np.array([seed], dtype=np.uint64))
    for part in (np.array([layer]), tokens.request_ids, tokens.positions):
        key = mixed(key ^ mixed(part.astype(np.uint64)))
    return key


def distinct(keys: NDArray[np.uint64], weights: Whole, top_k: int) -> NDArray[np.int32]:
    """Items drawn in turn, each in proportion to its weight among those that are left.

    That is the law of the top_k largest of log(weight) + Gumbel noise, without a number for each
    pair of a token and an item. Whole weights keep it exact: no rounding draws an item twice.

    Args:
        keys: random bits of each token.
        weights: of each item, at least 1 and below 2**51 together.
        top_k: items of a token.

    Returns:
        int32 [tokens, top_k], in the order in which they were drawn.
    """
    ends = weights.cumsum()
    starts = ends - weights
    left = np.full(len(keys), ends[-1])
    taken = np.empty((top_k, len(keys)), dtype=np.int64)
    drawn = np.empty((len(keys), top_k), dtype=np.int32)
    for at, bits in enumerate(_streams(keys, top_k)):
        # 52 bits: the product stays below `left` in every rounding.
        points = ((bits >> np.uint64(12)) * 2.0**-52 * left).astype(np.int64)
        # What is taken, in order, is cut out of the line that the points lie on.
        for one in taken[:at]:
            points += weights[one] * (points >= starts[one])
        found = ends.searchsorted(points, side="right")
        drawn[:, at] = found
        left -= weights[found]
        _insert(taken[: at + 1], found)
    return drawn


def distinct_evenly(keys: NDArray[np.uint64], num_items: int, top_k: int) -> NDArray[np.int32]:
    """`distinct` where all weights are 1, in half the time: the same draws."""
    taken = np.empty((top_k, len(keys)), dtype=np.int64)
    drawn = np.empty((len(keys), top_k), dtype=np.int32)
    for at, bits in enumerate(_streams(keys, top_k)):
        points = ((bits >> np.uint64(12)) * 2.0**-52 * (num_items - at)).astype(np.int64)
        for one in taken[:at]:
            points += points >= one
        drawn[:, at] = points
        _insert(taken[: at + 1], points)
    return drawn


def _streams(keys: NDArray[np.uint64], count: int) -> list[NDArray[np.uint64]]:
    """So many independent random columns from the same keys."""
    return [mixed(keys ^ mixed(np.array([at], dtype=np.uint64))) for at in range(count)]


def _insert(ranked: Whole, found: Whole) -> None:
    """Put a value into each column, which ascends but for its last entry, which is free."""
    for row in ranked[:-1]:
        larger = np.maximum(row, found)
        np.minimum(row, found, out=row)
        found = larger
    ranked[-1] = found
