"""Which requests are prefilled together, and by how many instances (LoongServe, section 5.3).

Requests stand in order of length, the longest first, instances in order of free slots, the freest
first. A partition cuts both rows into as many contiguous parts; the i-th batch runs on the i-th
part of the instances. With `f[i][k]` the least cost of the first i requests on all of the first k
instances, `T_c` the seconds of a batch on c instances and `W` the weight of its requests,

    f[i][k] = min over j < i, c <= k of f[j][k - c] + T_c(j..i) * W(j..i),

where the tokens of j..i must fit the free slots of the last c of the k instances.
"""

from collections.abc import Sequence
from enum import Enum
from math import inf
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from hardware_models.scaling import ScalingBase

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
SMALL = 2500
"""Sums up to so many are tried one by one: numpy's calls would take longer."""


class Objective(Enum):
    """What a partition makes least. Member names are what the command line takes."""

    normalised = "normalised"
    """Sum of input latency over length: the released code."""
    summed = "summed"
    """Sum of input latency: the paper's equation 5."""


class Search(Enum):
    """How the least is looked for. Member names are what the command line takes."""

    exact = "exact"
    """Every partition counts. O(E^2 R log R): for fixed k and c the sums are a Monge matrix."""
    monotone = "monotone"
    """Splits are bounded by their neighbours': the paper's equation 6. It may miss the least: the
    quadrangle inequality that it rests on does not hold in k."""


class Part(NamedTuple):
    """A batch and its group, by places in their rows; the stops are not in it."""

    request: int
    request_stop: int
    instance: int
    instance_stop: int


class Partition(NamedTuple):
    """All batches."""

    cost: float
    parts: tuple[Part, ...]


class _Sums:
    """Prefix sums of an instance of the problem."""

    def __init__(
        self, lengths: Sequence[int], free: Sequence[int], scaling: ScalingBase,
        objective: Objective,
    ) -> None:  # fmt: skip
        self.num_requests, self.num_instances = len(lengths), len(free)
        self.degrees = min(self.num_instances, scaling.max_degree)
        self.scaling = scaling.prefill[: self.degrees]
        self.tokens, self.squares, self.weights = [0], [0], [0.0]
        for length in lengths:
            self.tokens.append(self.tokens[-1] + length)
            self.squares.append(self.squares[-1] + length * length)
            weight = 1.0 if objective is Objective.summed else 1 / length
            self.weights.append(self.weights[-1] + weight)
        self.room = [0]
        for slots in free:
            self.room.append(self.room[-1] + slots)


def partition(
    lengths: Sequence[int], free: Sequence[int], scaling: ScalingBase,
    objective: Objective = Objective.normalised, search: Search = Search.exact,
) -> Partition | None:  # fmt: skip
    """The best partition on any number of the instances, the first ones; None: none fits.

    Args:
        lengths: tokens of each request, at least one, the longest first.
        free: slots of each instance, the most first.
        scaling: seconds by degree; a group has at most its largest degree.
        objective: what is least.
        search: how it is found.
    """
    if not lengths or not free:
        return None
    sums = _Sums(lengths, free, scaling, objective)
    if search is Search.monotone:
        cost, split, degree = _monotone(sums)
    elif sums.num_requests**2 * sums.num_instances * sums.degrees <= 4 * SMALL:
        cost, split, degree = _one_by_one(sums)
    else:
        cost, split, degree = _by_halves(sums)
    last = [row[-1] for row in cost]
    used = min(range(len(last)), key=last.__getitem__)
    if last[used] == inf:
        return None
    parts: list[Part] = []
    request, instance = len(lengths), used
    while request:
        before = int(split[instance][request]), instance - int(degree[instance][request])
        parts.append(Part(before[0], request, before[1], instance))
        request, instance = before
    return Partition(float(last[used]), tuple(reversed(parts)))


_Table = Sequence[Sequence[float]]
_Found = tuple[_Table, Sequence[Sequence[int]], Sequence[Sequence[int]]]


def _one_by_one(sums: _Sums) -> _Found:
    """All sums, in plain Python: for the few requests of most admissions."""
    count, places = sums.num_requests + 1, sums.num_instances + 1
    tokens, squares, weights, room = sums.tokens, sums.squares, sums.weights, sums.room
    cost = [[inf] * count for _ in range(places)]
    split, degree = [[0] * count for _ in range(places)], [[0] * count for _ in range(places)]
    cost[0][0] = 0.0
    for k in range(1, places):
        row = cost[k]
        for c in range(1, min(k, sums.degrees) + 1):
            one, before, slots = sums.scaling[c - 1], cost[k - c], room[k] - room[k - c]
            base, linear, square = one.base_s, one.token_s, one.square_s
            for i in range(1, count):
                for j in range(i - 1, -1, -1) if c < k else (0,):
                    more = tokens[i] - tokens[j]
                    if more > slots:
                        break
                    took_s = base + linear * more + square * (squares[i] - squares[j])
                    total = before[j] + took_s * (weights[i] - weights[j])
                    if total < row[i]:
                        row[i], split[k][i], degree[k][i] = total, j, c
    return cost, split, degree


class _Arrays:
    """Of the vector versions. `growth[c - 1, i]`: seconds of the first i on c, without the base."""

    def __init__(self, sums: _Sums) -> None:
        count, places = sums.num_requests + 1, sums.num_instances + 1
        self.tokens = np.array(sums.tokens, np.int64)
        self.weights = np.array(sums.weights)
        squares = np.array(sums.squares, np.float64)
        self.room = np.array(sums.room, np.int64)
        self.base = np.array([one.base_s for one in sums.scaling])
        self.growth = np.array(
            [one.token_s * self.tokens + one.square_s * squares for one in sums.scaling]
        )
        self.cost = np.full((places, count), inf)
        self.cost[0, 0] = 0.0
        self.split = np.zeros((places, count), np.int64)
        self.degree = np.zeros((places, count), np.int64)


def _by_halves(sums: _Sums) -> _Found:
    """Row minima of the Monge matrices, of all c of one k at once.

    `T_c * W` is a product of interval sums, and a constant times one: its matrix over (i, j) obeys
    the quadrangle inequality, also with infinity where j..i is empty or too large, so that the
    leftmost best j does not fall as i grows. The row in the middle halves what is left to search.
    """
    of = _Arrays(sums)
    for k in range(1, sums.num_instances + 1):
        if k <= sums.degrees:  # one batch
            whole = (of.base[k - 1] + of.growth[k - 1]) * of.weights
            fits = of.tokens <= of.room[k]
            fits[0] = False
            of.cost[k, fits], of.degree[k, fits] = whole[fits], k
        degrees = np.arange(1, min(k - 1, sums.degrees) + 1, dtype=np.int64)
        if len(degrees):
            found, at = _row_minima(of, k, degrees)
            best = found.argmin(axis=0)
            columns: Ints = np.arange(found.shape[1], dtype=np.int64)
            better = found[best, columns] < of.cost[k]
            of.cost[k, better] = found[best, columns][better]
            of.split[k, better] = at[best, columns][better]
            of.degree[k, better] = best[better] + 1
    return of.cost.tolist(), of.split.tolist(), of.degree.tolist()


def _row_minima(of: _Arrays, k: int, degrees: Ints) -> tuple[Floats, Ints]:
    """[degrees, requests + 1] the least sum of each row, and the leftmost j that has it."""
    count = len(of.tokens)
    slots = (of.room[k] - of.room[k - degrees])[:, None]
    lowest = cast(Ints, np.searchsorted(of.tokens, of.tokens[None, :] - slots))
    known = np.zeros((len(degrees), count + 1), np.int64)
    np.cumsum(np.isfinite(of.cost[k - degrees]), axis=1, out=known[:, 1:])
    before = np.arange(len(degrees))[:, None], lowest
    # Rows without any finite sum are left out: they would tell nothing of where to search.
    possible: NDArray[np.bool_] = known[:, :count] > known[before]
    lengths: Ints = np.count_nonzero(possible, axis=1)
    size = 1 << int(lengths.max()).bit_length()
    rows = np.zeros((len(degrees), size), np.int64)
    which, row = np.nonzero(possible)
    place = np.arange(len(which)) - np.repeat(np.cumsum(lengths) - lengths, lengths) + 1
    rows[which, place] = row
    bounds = np.full((len(degrees), size + 1), count, np.int64)
    bounds[:, 0] = 0
    least = np.full((len(degrees), count), inf)
    where = np.zeros((len(degrees), count), np.int64)
    half = size // 2
    while half:
        places = np.arange(half, size, 2 * half)
        at, nth = np.nonzero(places[None, :] <= lengths[:, None])
        place = places[nth]
        ends = rows[at, place]
        low = np.maximum(bounds[at, place - half], lowest[at, ends])
        high = np.minimum(bounds[at, place + half], ends - 1)
        values, best = _least_in(of, (k - degrees)[at], at, ends, (low, high))
        bounds[at, place] = best
        least[at, ends], where[at, ends] = values, best
        half //= 2
    return least, where


def _least_in(
    of: _Arrays, before: Ints, at: Ints, ends: Ints, window: tuple[Ints, Ints]
) -> tuple[Floats, Ints]:
    """For each row, the least sum over j in its window, both ends in it, and the first such j."""
    low, high = window
    sizes = high - low + 1
    stops = np.cumsum(sizes)
    starts = stops - sizes
    if not len(sizes):
        return np.zeros(0), starts
    j: Ints = np.arange(int(stops[-1]), dtype=np.int64) + np.repeat(low - starts, sizes)
    count = len(of.tokens)
    seconds = np.repeat(of.base[at] + of.growth[at, ends], sizes)
    seconds -= of.growth.ravel()[np.repeat(at * count, sizes) + j]
    weights = np.repeat(of.weights[ends], sizes)
    weights -= of.weights[j]
    seconds *= weights
    seconds += of.cost.ravel()[np.repeat(before * count, sizes) + j]
    least = np.minimum.reduceat(seconds, starts)
    equal = np.flatnonzero(seconds == np.repeat(least, sizes))
    first = equal[np.searchsorted(equal, starts)]
    return least, j[first]


def _monotone(sums: _Sums) -> _Found:
    """Cell by cell: j is not before that of (i, k - 1), and k - c not below that of (i - 1, k).

    A cell for which these bounds leave nothing is searched without them: a partition is found
    whenever there is one.
    """
    of = _Arrays(sums)
    for k in range(1, sums.num_instances + 1):
        most = min(k, sums.degrees)
        for i in range(1, sums.num_requests + 1):
            first = int(of.split[k - 1, i]) if of.cost[k - 1, i] < inf else 0
            last = int(of.degree[k, i - 1]) or most
            if not _cell(of, (k, i), range(1, last + 1), first) and (first or last < most):
                _cell(of, (k, i), range(1, most + 1), 0)
    return of.cost.tolist(), of.split.tolist(), of.degree.tolist()


def _cell(of: _Arrays, at: tuple[int, int], degrees: range, first: int) -> bool:
    """Search one cell (k, i) over these c and j from `first` on; whether anything fits."""
    k, i = at
    low, high = degrees.start - 1, degrees.stop - 1
    before = of.cost[k - degrees.stop + 1 : k - degrees.start + 1, first:i][::-1]
    room = (of.room[k] - of.room[k - degrees.stop + 1 : k - degrees.start + 1])[::-1]
    seconds = (of.base[low:high] + of.growth[low:high, i])[:, None] - of.growth[low:high, first:i]
    sums = before + seconds * (of.weights[i] - of.weights[first:i])
    sums[of.tokens[i] - of.tokens[first:i] > room[:, None]] = inf
    best = int(sums.argmin())
    degree, j = divmod(best, i - first)
    if sums[degree, j] == inf:
        return False
    of.cost[k, i], of.split[k, i], of.degree[k, i] = sums[degree, j], j + first, degree + low + 1
    return True
