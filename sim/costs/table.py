"""A table of measurements over any number of axes, read between its points.

What is stored is not seconds but their ratio to a model of the same work (a roofline). The ratio is
smooth where seconds are not, so its logarithm is interpolated, linearly in the logarithm of each
axis; beyond the grid the ratio of the nearest point goes on. The grid may have holes: each point of
an axis has an axis of its own behind it.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from math import log1p
from typing import NamedTuple

from sim.costs.seconds import Seconds


class Reading(NamedTuple):
    """A ratio, and how the table came by it."""

    ratio: float
    inside: bool
    """No axis had to be left for it."""
    exact: bool
    """It is a measured point."""

    def seconds(self, model_s: float) -> Seconds:
        """Seconds of work that the model puts at `model_s`."""
        value = self.ratio * model_s
        if not self.inside:
            return Seconds(extrapolated=value)
        return Seconds(measured=value) if self.exact else Seconds(interpolated=value)


class Table:
    """Ratios over one axis; each point holds a ratio or the table of the axes that follow."""

    __slots__ = ("_logs", "children", "keys")

    def __init__(self, keys: Sequence[float], children: Sequence["Table | float"]) -> None:
        """Take the points of the axis, increasing, and what lies behind each."""
        self.keys = list(keys)
        self.children = list(children)
        self._logs = [log1p(key) for key in self.keys]

    def at(self, *point: float) -> Reading:
        """The ratio at a point: one coordinate an axis, the outermost first."""
        return self._at(point, 0)

    def _at(self, point: tuple[float, ...], axis: int) -> Reading:
        keys, where = self.keys, point[axis]
        index = bisect_left(keys, where)
        if index < len(keys) and keys[index] == where:
            return self._below(index, point, axis)
        if index in (0, len(keys)):
            found = self._below(min(index, len(keys) - 1), point, axis)
            return Reading(found.ratio, False, False)
        low = self._below(index - 1, point, axis)
        high = self._below(index, point, axis)
        logs = self._logs
        share = (log1p(where) - logs[index - 1]) / (logs[index] - logs[index - 1])
        ratio = low.ratio * (high.ratio / low.ratio) ** share
        return Reading(ratio, low.inside and high.inside, False)

    def _below(self, index: int, point: tuple[float, ...], axis: int) -> Reading:
        child = self.children[index]
        if isinstance(child, Table):
            return child._at(point, axis + 1)
        return Reading(child, True, True)


def table(rows: Iterable[Sequence[float]]) -> Table:
    """The table of rows (coordinate of each axis, outermost first, and the ratio last).

    Raises:
        ValueError: there are no rows, a ratio is not positive, or one point is given twice.
    """
    ordered = sorted(tuple(row) for row in rows)
    if not ordered:
        raise ValueError("a table without measurements cannot answer; measure something first")
    idle = next((row for row in ordered if not row[-1] > 0), None)
    if idle is not None:
        raise ValueError(f"point {idle[:-1]} took no time; a measurement must be positive")
    return _nested(ordered, 0)


def _nested(rows: list[tuple[float, ...]], axis: int) -> Table:
    keys: list[float] = []
    groups: list[list[tuple[float, ...]]] = []
    for row in rows:
        if not keys or row[axis] != keys[-1]:
            keys.append(row[axis])
            groups.append([])
        groups[-1].append(row)
    if axis == len(rows[0]) - 2:
        doubled = next((group[0] for group in groups if len(group) > 1), None)
        if doubled is not None:
            raise ValueError(f"point {doubled[:-1]} is given twice; keep one of its measurements")
        return Table(keys, [group[0][-1] for group in groups])
    return Table(keys, [_nested(group, axis + 1) for group in groups])
