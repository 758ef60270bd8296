"""How long a replica's iterations last: from a cost, or as logged by the other panel."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from hashlib import blake2b
from itertools import accumulate
from struct import pack
from typing import Protocol, Self

import numpy as np

from sim.costs.base import IterationCost
from sim.models.work import IterationShape
from sim.trace import Trace


class Pace(Protocol):
    """Turns work into boundaries on the time axis."""

    @property
    def start_s(self) -> float | None:
        """When the first decision is taken; None: when something has come in."""
        ...

    @property
    def takes_turns(self) -> bool:
        """Whether others wait for the same thing: who asked first decides first."""
        ...

    def decides_s(self, now_s: float) -> float:
        """When the next decision is taken, if an iteration has ended at `now_s` or none ran."""
        ...

    def wakes_s(self, now_s: float) -> float | None:
        """When an idle replica decides again; None: as soon as something comes in."""
        ...

    def iteration(self, now_s: float, shape: IterationShape) -> list[float]:
        """`[now_s, end]` of one iteration."""
        ...

    def decode_run(
        self, now_s: float, num_decodes: int, decode_context: int, iterations: int
    ) -> list[float]:
        """Boundaries of up to `iterations` decode-only iterations, `now_s` first."""
        ...


class AtOnce:
    """Decides as soon as there is something to decide about."""

    start_s = None
    takes_turns = False

    def decides_s(self, now_s: float) -> float:
        """Now."""
        return now_s

    def wakes_s(self, now_s: float) -> float | None:
        """When something comes in."""
        del now_s
        return None


class Costed(AtOnce):
    """Boundaries from a cost, each iteration's seconds added to the boundary before it."""

    def __init__(self, cost: IterationCost) -> None:
        self._iteration_s = cost.iteration_s
        self._decode_run_s = cost.decode_run_s

    def iteration(self, now_s: float, shape: IterationShape) -> list[float]:
        """`[now_s, end]` of one iteration."""
        return [now_s, now_s + self._iteration_s(shape)]

    def decode_run(
        self, now_s: float, num_decodes: int, decode_context: int, iterations: int
    ) -> list[float]:
        """Boundaries of `iterations` decode-only iterations, `now_s` first."""
        seconds = self._decode_run_s(num_decodes, decode_context, iterations)
        return list(accumulate(seconds, initial=now_s))


class Jittered(AtOnce):
    """As `Costed`, but no iteration takes quite what its like take on average.

    Each takes its cost times one of the measured ratios. Which one depends on the seed and on the
    instant of its start only, so that a decode stretch has the boundaries of its iterations one by
    one.
    """

    def __init__(self, cost: IterationCost, jitter: "Jitter") -> None:
        self._cost = cost
        self._ratio = jitter.ratio

    def iteration(self, now_s: float, shape: IterationShape) -> list[float]:
        """`[now_s, end]` of one iteration."""
        return [now_s, now_s + self._cost.iteration_s(shape) * self._ratio(now_s)]

    def decode_run(
        self, now_s: float, num_decodes: int, decode_context: int, iterations: int
    ) -> list[float]:
        """Boundaries of `iterations` decode-only iterations, `now_s` first."""
        boundaries = [now_s]
        for seconds in self._cost.decode_run_s(num_decodes, decode_context, iterations):
            boundaries.append(boundaries[-1] + seconds * self._ratio(boundaries[-1]))
        return boundaries


class Jitter:
    """By how much an iteration differs from its like; depends on the instant of its start only."""

    def __init__(self, ratios: Sequence[float], seed: int) -> None:
        """Take equally likely ratios of an iteration's seconds to their mean; empty: none."""
        self._ratios = list(ratios) or [1.0]
        self._seed = seed

    def ratio(self, instant_s: float) -> float:
        """Of an iteration that starts then."""
        key = blake2b(pack("<qd", self._seed, instant_s), digest_size=8).digest()
        return self._ratios[int.from_bytes(key, "little") % len(self._ratios)]


class Replayed:
    """Decides at the instants at which another run did, and ends iterations when it did: replay."""

    takes_turns = False

    def __init__(
        self, instants_s: Sequence[float], ends_s: Sequence[float],
        others_s: Sequence[float] = (), beyond_s: float = 0.0,
    ) -> None:  # fmt: skip
        """Take over a log.

        Args:
            instants_s: of every decision, increasing.
            ends_s: of the iteration after each.
            others_s: instants at which something else was decided, such as to fetch KV, or noted.
            beyond_s: when an iteration ends that is not in the log, as the one is not in which a
                replica died.
        """
        self._instants = sorted({*instants_s, *others_s})
        self._end_s = dict(zip(instants_s, ends_s, strict=True))
        self._beyond_s = beyond_s
        self.start_s = self._instants[0] if self._instants else None

    @classmethod
    def of(cls, trace: Trace) -> Self:
        """The instants of a trace of one replica, all of whose decisions were asked for."""
        fetched_s = trace.hand_overs["fetched_s"]
        # A client that leaves may be noted where nothing is left to compute, and so no batch is.
        others_s = [*fetched_s[~np.isnan(fetched_s)].tolist(), *trace.stages["instant_s"].tolist()]
        iterations = trace.iterations
        return cls(iterations["start_s"].tolist(), iterations["end_s"].tolist(), others_s)

    def decides_s(self, now_s: float) -> float:
        """The first logged instant from now on."""
        index = bisect_left(self._instants, now_s)
        # Past the log the panels have parted; the count of decisions will say so.
        return self._instants[index] if index < len(self._instants) else now_s

    def wakes_s(self, now_s: float) -> float | None:
        """The first logged instant after now."""
        index = bisect_right(self._instants, now_s)
        return self._instants[index] if index < len(self._instants) else None

    def iteration(self, now_s: float, shape: IterationShape) -> list[float]:
        """From this decision to the logged end of its iteration."""
        del shape
        return [now_s, self._after(now_s)]

    def decode_run(
        self, now_s: float, num_decodes: int, decode_context: int, iterations: int
    ) -> list[float]:
        """As one iteration: replay goes one by one."""
        del num_decodes, decode_context, iterations
        return [now_s, self._after(now_s)]

    def _after(self, now_s: float) -> float:
        beyond_s = self._beyond_s if self._beyond_s > now_s else now_s + 1.0
        return self._end_s.get(now_s, beyond_s)
