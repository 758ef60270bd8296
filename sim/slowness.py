"""By how much the parts of a replica are slow, and from when to when."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from math import inf, prod
from typing import NamedTuple

from sim.faults import Fault, Kind, Part


class Apart(NamedTuple):
    """Of an iteration's seconds, those that are not the computing of all layers."""

    communication_s: float = 0.0
    """Collectives of the replica's ranks."""
    overhead_s: float = 0.0
    """Of the engine, on the CPU."""
    head_s: float = 0.0
    """Computing of the last stage alone: the lm_head and sampling."""


class Slowness(NamedTuple):
    """Factors by which seconds grow."""

    stages: tuple[float, ...]
    """Of computing, stage by stage: its ranks wait for the slowest."""
    link: float
    """Of communication; infinite where a link is dead."""
    node: float
    """Of all."""

    def seconds(self, total_s: float, apart: Apart, layers: Sequence[int]) -> float:
        """What an iteration takes that takes `total_s` otherwise.

        Args:
            total_s: of the iteration on sound hardware.
            apart: which part of it is not the computing of layers.
            layers: of each stage.
        """
        computing_s = total_s - apart.communication_s - apart.overhead_s
        if len(self.stages) == 1:
            slowed_s = computing_s * self.stages[0]
        else:
            body_s = computing_s - apart.head_s
            shares = zip(layers, self.stages, strict=True)
            slowed_s = sum(body_s * count / sum(layers) * factor for count, factor in shares)
            slowed_s += apart.head_s * self.stages[-1]
        # A dead link stops nothing that does not cross it.
        communication_s = apart.communication_s and apart.communication_s * self.link
        return (slowed_s + communication_s + apart.overhead_s) * self.node


class Slow(NamedTuple):
    """A stretch of time in which a replica is slow, or is not."""

    until_s: float
    slowness: Slowness | None
    """None: nothing is slow."""


class SlowTimes:
    """The whole time of a replica, cut where its slowness changes."""

    def __init__(self, faults: Sequence[Fault], layers: Sequence[int], tp_size: int = 1) -> None:
        """Take the faults of one replica.

        Args:
            faults: its own; those that kill it have no part in this.
            layers: of each of its stages.
            tp_size: its ranks in each stage.
        """
        self.layers = tuple(layers)
        lasting = [one for one in faults if not one.kills]
        changes = {0.0, *(one.at_s for one in lasting), *(one.end_s for one in lasting)}
        self._starts_s = sorted(changes - {inf})
        ends_s = [*self._starts_s[1:], inf]
        self._slow = [
            Slow(end_s, _slowness(lasting, start_s, len(layers), tp_size))
            for start_s, end_s in zip(self._starts_s, ends_s, strict=True)
        ]

    def at(self, instant_s: float) -> Slow:
        """How slow it is from an instant on, and until when."""
        return self._slow[bisect_right(self._starts_s, instant_s) - 1]

    def end_s(self, start_s: float, total_s: float, apart: Apart) -> float:
        """When an iteration ends that begins at `start_s` and takes `total_s` if nothing is slow.

        Work goes on at the rate of each instant; its parts lie evenly over the iteration.
        """
        left = 1.0
        while True:
            until_s, slowness = self.at(start_s)
            taken_s = total_s
            if slowness is not None:
                taken_s = slowness.seconds(total_s, apart, self.layers)
            end_s = start_s + taken_s * left
            if end_s <= until_s:
                return end_s
            left -= (until_s - start_s) / taken_s
            if left <= 0:  # by a rounding
                return until_s
            start_s = until_s

    def boundaries(self, start_s: float, totals_s: Sequence[float], apart: Apart) -> list[float]:
        """`start_s` and the ends of iterations that follow each other, as `end_s` gives them."""
        until_s, slowness = self.at(start_s)
        taken_s = totals_s
        if slowness is not None:
            taken_s = [slowness.seconds(total_s, apart, self.layers) for total_s in totals_s]
        found = list(accumulate(taken_s, initial=start_s))
        if found[-1] <= until_s:
            return found
        found = [start_s]
        for total_s in totals_s:
            found.append(self.end_s(found[-1], total_s, apart))
        return found


def _slowness(
    faults: Sequence[Fault], instant_s: float, num_stages: int, tp_size: int
) -> Slowness | None:
    """What the faults of an instant add up to; factors of one part multiply."""
    now = [one for one in faults if one.at_s <= instant_s < one.end_s]
    if not now:
        return None

    def factor(part: Part, gpu: int = 0) -> float:
        mine = [one for one in now if one.part is part and one.gpu == gpu]
        return prod(inf if one.kind is Kind.dead else one.factor or 1.0 for one in mine)

    ranks = [factor(Part.gpu, gpu) for gpu in range(num_stages * tp_size)]
    stages = tuple(max(ranks[at * tp_size : (at + 1) * tp_size]) for at in range(num_stages))
    return Slowness(stages, factor(Part.link), factor(Part.node))
