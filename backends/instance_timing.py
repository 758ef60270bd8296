"""Timings in an instance's process: its own iterations, and the KV that it fetches."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from backends.calibration import Passes
from backends.executor import Executor
from backends.kv_link import Fetch, Receiver, Sender
from sim.costs.calibration_plan import BatchPlan
from sim.costs.fitting import Measured

WAIT = Callable[[], object]


class Timed(NamedTuple):
    """What an instance's passes over the planned batches found."""

    measured: list[Measured]
    """Since the pass that was asked for."""
    jitter: list[float]
    spread: float


class MovePlan(NamedTuple):
    """Requests of so many blocks each, to be fetched one after another."""

    source: int
    blocks: list[int]


class InstanceTiming:
    """Answers the commands that time an instance. All instances are asked at once.

    So each times its iterations while the others run theirs, as when they serve.
    """

    def __init__(
        self, model: Executor, block_size: int, mover: Sender | Receiver, told: WAIT
    ) -> None:
        """Take over an instance that is warm.

        Args:
            model: what it runs.
            block_size: of its caches.
            mover: what sends or receives KV.
            told: waits until the mover has told of one request.
        """
        self._model, self._block_size, self._mover, self._told = model, block_size, mover, told
        self._passes: Passes | None = None
        self._num_held = 0

    @property
    def commands(self) -> Mapping[str, Callable[[Any], Any]]:
        """By the kind of message."""
        return {
            "prepare": self.prepare, "time": self.time, "timed": self.timed, "hold": self.hold,
            "fetch": self.fetch, "held": self.held,
        }  # fmt: skip

    def prepare(self, plans: Sequence[BatchPlan]) -> None:
        """Make ready to time these batches."""
        self._passes = Passes(self._model, plans, lambda: None)

    def time(self, part: tuple[int, int]) -> None:
        """Time a part of the batches once more: which of how many."""
        assert self._passes is not None
        self._passes.time(*part)

    def timed(self, first_pass: int) -> Timed:
        """The timings since a pass."""
        passes = self._passes
        assert passes is not None
        return Timed(passes.measured(first_pass), passes.jitter(), passes.spread())

    def hold(self, plan: MovePlan) -> None:
        """Keep blocks ready for whoever fetches them, where this instance prefills."""
        if isinstance(self._mover, Sender):
            for number, count in enumerate(plan.blocks):
                cache = self._model.new_cache(count, self._block_size)
                self._mover.hold(number, cache, list(range(count)))
            self._num_held = len(plan.blocks)

    def fetch(self, plan: MovePlan) -> list[tuple[int, float]]:
        """Bytes and seconds of each fetch, where this instance decodes."""
        found: list[tuple[int, float]] = []
        if isinstance(self._mover, Receiver):
            for number, count in enumerate(plan.blocks):
                cache = self._model.new_cache(count, self._block_size)
                start = time.perf_counter()
                self._mover.fetch(Fetch(number, plan.source, list(range(count))), cache)
                self._told()
                took_s = time.perf_counter() - start
                found.append((count * self._block_size * cache.token_bytes, took_s))
        return found

    def held(self, _: object) -> None:
        """Wait until all that was held has been fetched, where this instance prefills."""
        for _fetch in range(self._num_held):
            self._told()
        self._num_held = 0
