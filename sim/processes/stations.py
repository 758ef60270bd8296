"""One iteration of a ping-pong pipeline, event by event: four stations, each in a fixed order.

Attention nodes, the way to the experts (M2N), expert nodes, and the way back (N2M). A station
serves one micro-batch at a time, layer after layer, always in the order of the micro-batches, as
MegaScale-Infer's section 4.1 draws it. Nodes of one kind are one station that takes as long as its
slowest node: no micro-batch leaves attention, or the experts, before all of its tokens have.
"""

from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from simpy.events import Event

from sim.processes.exact_time import ExactEnvironment

Seconds = NDArray[np.float64]
Job = tuple[int, int]
"""(layer, micro-batch)."""
STATIONS = ("attention", "dispatch", "experts", "combine")


class StageTimes(NamedTuple):
    """Seconds of every station. Shape of each: layers, micro-batches."""

    attention_s: Seconds
    dispatch_s: Seconds
    expert_s: Seconds
    combine_s: Seconds
    outside_s: Seconds
    """Embedding, lm_head and sampling, on attention, once a micro-batch. Shape: micro-batches."""

    @classmethod
    def alike(
        cls, attention_s: float, expert_s: float, transfer_s: float, sizes: tuple[int, int],
        outside_s: float = 0.0,
    ) -> "StageTimes":  # fmt: skip
        """The same in all layers and for all micro-batches; `sizes`: (layers, micro-batches)."""
        way_s = np.full(sizes, transfer_s)
        outside = np.full(sizes[1], outside_s)
        return cls(np.full(sizes, attention_s), way_s, np.full(sizes, expert_s), way_s, outside)


class Visit(NamedTuple):
    """A station served a micro-batch."""

    station: int
    layer: int
    """The number of layers for what is outside of them."""
    micro_batch: int
    start_s: float
    end_s: float


Ways = Callable[[int, int, int], Event]
"""Called with (station, layer, micro-batch); fires when the transfer is over."""


class Iteration:
    """The stations, at work on one iteration that begins now."""

    def __init__(
        self, environment: ExactEnvironment, times: StageTimes, ways: Ways | None = None,
        visited: Callable[[Visit], None] | None = None,
    ) -> None:  # fmt: skip
        """Let all micro-batches enter.

        Args:
            environment: whose now is the start.
            times: of the stations.
            ways: transfers, where they are not simply as long as `times` says, such as flows over
                a network that others use too.
            visited: told of everything that a station did.
        """
        self._environment, self._times, self._ways = environment, times, ways
        self._visited = visited
        self.num_layers, self.num_micro_batches = times.attention_s.shape
        self._waiting = [0] * len(STATIONS)
        """Micro-batches that wait before each station; they come in the order in which they go."""
        self._idle: list[Event | None] = [None] * len(STATIONS)
        self.done: Event = environment.process(self._attention())
        """Fires when the last micro-batch has its tokens."""
        for station in range(1, len(STATIONS)):
            environment.process(self._serve(station))

    def _jobs(self) -> Iterator[Job]:
        for layer in range(self.num_layers):
            for micro_batch in range(self.num_micro_batches):
                yield layer, micro_batch

    def _attention(self) -> Generator[Event, Any, None]:
        """Attention begins an iteration and ends it."""
        for layer, micro_batch in self._jobs():
            if layer:
                yield from self._next(0)
            yield from self._compute(0, layer, micro_batch, self._times.attention_s)
            self._pass(1)
        outside_s = self._times.outside_s
        for micro_batch in range(self.num_micro_batches):
            yield from self._next(0)
            start_s = self._environment.now
            if outside_s[micro_batch]:
                yield self._environment.boundary(start_s + float(outside_s[micro_batch]))
            self._note(0, self.num_layers, micro_batch, start_s)

    def _serve(self, station: int) -> Generator[Event, Any, None]:
        times = self._times[station]
        following = (station + 1) % len(STATIONS)
        moves = station != STATIONS.index("experts")
        for layer, micro_batch in self._jobs():
            yield from self._next(station)
            if moves and self._ways is not None:
                start_s = self._environment.now
                yield self._ways(station, layer, micro_batch)
                self._note(station, layer, micro_batch, start_s)
            else:
                yield from self._compute(station, layer, micro_batch, times)
            self._pass(following)

    def _next(self, station: int) -> Generator[Event, Any, None]:
        """Wait for the next micro-batch before a station."""
        if not self._waiting[station]:
            self._idle[station] = idle = Event(self._environment)
            yield idle
        self._waiting[station] -= 1

    def _pass(self, station: int) -> None:
        """A micro-batch comes to a station."""
        self._waiting[station] += 1
        if (idle := self._idle[station]) is not None:
            self._idle[station] = None
            idle.succeed()

    def _compute(
        self, station: int, layer: int, micro_batch: int, times: Seconds
    ) -> Generator[Event, Any, None]:
        start_s = self._environment.now
        yield self._environment.boundary(start_s + float(times[layer, micro_batch]))
        self._note(station, layer, micro_batch, start_s)

    def _note(self, station: int, layer: int, micro_batch: int, start_s: float) -> None:
        if self._visited is not None:
            now_s = self._environment.now
            self._visited(Visit(station, layer, micro_batch, start_s, now_s))


def iteration_s(times: StageTimes) -> float:
    """Seconds of one iteration, from the first attention to the last token."""
    environment = ExactEnvironment()
    environment.run(until=Iteration(environment, times).done)
    return environment.now
