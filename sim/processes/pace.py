"""How long a replica's iterations last: from a cost, or as logged by the other panel."""

from bisect import bisect_right
from collections.abc import Sequence
from hashlib import blake2b
from itertools import accumulate
from struct import pack
from typing import Protocol

from sim.costs.base import IterationCost
from sim.models.work import IterationShape
from sim.trace import Trace


class Pace(Protocol):
    """Turns work into boundaries on the time axis."""

    @property
    def start_s(self) -> float:
        """No decision is taken before this instant."""
        ...

    def iteration(self, now_s: float, shape: IterationShape) -> list[float]:
        """`[now_s, end]` of one iteration."""
        ...

    def decode_run(
        self, now_s: float, num_decodes: int, decode_context: int, iterations: int
    ) -> list[float]:
        """Boundaries of up to `iterations` decode-only iterations, `now_s` first."""
        ...


class Costed:
    """Boundaries from a cost, each iteration's seconds added to the boundary before it."""

    start_s = 0.0

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


class Jittered:
    """As `Costed`, but no iteration takes quite what its like take on average.

    Each takes its cost times one of the measured ratios. Which one depends on the seed and on the
    instant of its start only, so that a decode stretch has the boundaries of its iterations one by
    one.
    """

    start_s = 0.0

    def __init__(self, cost: IterationCost, ratios: Sequence[float], seed: int) -> None:
        """Take equally likely ratios of an iteration's seconds to their mean; empty: none."""
        self._cost = cost
        self._ratios = list(ratios) or [1.0]
        self._seed = seed

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

    def _ratio(self, instant_s: float) -> float:
        key = blake2b(pack("<qd", self._seed, instant_s), digest_size=8).digest()
        return self._ratios[int.from_bytes(key, "little") % len(self._ratios)]


class Replayed:
    """Boundaries are the instants of decisions that another run logged: replay."""

    def __init__(self, instants_s: Sequence[float], end_s: float) -> None:
        """Take the decision instants, increasing, and the end of the last iteration."""
        self._boundaries = [*instants_s, end_s]
        self.start_s = self._boundaries[0]

    @classmethod
    def of(cls, trace: Trace) -> "Replayed":
        """The instants of a trace of one replica, whose decisions were logged one by one."""
        if not trace.num_iterations:
            return cls([], 0.0)
        last_s = float(trace.iterations["end_s"][-1])
        return cls(trace.decisions["instant_s"].tolist(), last_s)

    def iteration(self, now_s: float, shape: IterationShape) -> list[float]:
        """From this decision to the next logged one."""
        del shape
        return [now_s, self._after(now_s)]

    def decode_run(
        self, now_s: float, num_decodes: int, decode_context: int, iterations: int
    ) -> list[float]:
        """From this decision to the next logged one: replay goes one by one."""
        del num_decodes, decode_context, iterations
        return [now_s, self._after(now_s)]

    def _after(self, now_s: float) -> float:
        index = bisect_right(self._boundaries, now_s)
        # Past the log the panels have parted; the count of decisions will say so.
        return self._boundaries[index] if index < len(self._boundaries) else now_s + 1.0
