"""Threads that search while the engine computes; what each stage finds comes back as a message."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class Search(Protocol):
    """A search in stages that several threads may use at once, as `StagedSearch` is."""

    @property
    def num_stages(self) -> int:
        """Stages of every search."""
        ...

    def stages(self, query: NDArray[np.float32]) -> Iterator[tuple[int, ...]]:
        """The documents found so far after each stage of a query float32 [dimension]."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A search that a request asks for."""

    request_id: int
    arrival_s: float
    """When it is asked for, in seconds after t = 0."""
    query: NDArray[np.float32]
    """float32 [dimension]."""


class Found(NamedTuple):
    """What a stage of a request's search found."""

    request_id: int
    stage: int
    """From 0 on."""
    documents: tuple[int, ...]
    """Nearest first, over all stages so far."""
    begin_s: float
    """When the search of the request began, in seconds after t = 0."""
    instant_s: float
    """When the stage was over, in seconds after t = 0."""
    final: bool
    """Whether it was the last stage."""


class _Failed(NamedTuple):
    request_id: int
    error: Exception


class SearchPool:
    """Searches for requests at the times at which they arrive, in order of arrival.

    A worker takes the next request, sleeps until it arrives and runs its stages. So a request that
    arrives while all workers search waits for the first that is free. The methods are for one
    thread, that of the engine loop; a `with` block closes the pool.
    """

    def __init__(
        self,
        search: Search,
        wanted: Sequence[Wanted],
        *,
        num_workers: int = 1,
        stage_s: float = 0.0,
    ) -> None:
        """Take the work on; nothing runs before `start`.

        Args:
            search: what searches.
            wanted: all requests, in any order; at equal arrivals the smaller number goes first.
            num_workers: searches that run at once.
            stage_s: a stage takes at least so many seconds: a worker that is done earlier sleeps.
                Any ratio of search to prefill can so be tried on a small machine. With more than 0,
                the durations are emulated, and what was measured is to be labelled so.

        Raises:
            ValueError: a number is out of range, or a request is there twice.
        """
        if num_workers < 1:
            raise ValueError(f"num_workers={num_workers} must be at least 1; try 1")
        if not (isfinite(stage_s) and stage_s >= 0):
            raise ValueError(f"stage_s={stage_s} must be finite and not negative; 0 adds nothing")
        _check_requests(wanted)
        self.is_emulated = stage_s > 0
        """Whether stages are held back."""
        self._search = search
        self._stage_s = stage_s
        self._num_left = len(wanted)
        self._todo = iter(sorted(wanted, key=lambda one: (one.arrival_s, one.request_id)))
        self._taking = Lock()
        self._stopped = Event()
        self._queue: SimpleQueue[Found | _Failed] = SimpleQueue()
        self._ahead: list[Found | _Failed] = []
        self._start, self._is_running = 0.0, False
        count = min(num_workers, len(wanted))
        self._threads = [
            Thread(target=self._work, name=f"search-{index}", daemon=True) for index in range(count)
        ]

    def start(self, start: float) -> None:
        """Let the workers begin.

        Args:
            start: what `time.perf_counter()` reads at t = 0; it may lie ahead.

        Raises:
            ValueError: the pool was started or closed before.
        """
        if self._is_running or self._stopped.is_set():
            raise ValueError("the pool was started or closed before; make another one")
        self._start, self._is_running = start, True
        for thread in self._threads:
            thread.start()

    def due(self) -> list[Found]:
        """All that was found and not handed out before; the stages of a request in their order.

        Raises:
            RuntimeError: a search failed. It names the request, its cause is the error, and the
                pool is of no more use: close it.
        """
        with suppress(Empty):
            while True:
                self._ahead.append(self._queue.get_nowait())
        taken: list[Found] = []
        for message in self._ahead:
            if isinstance(message, _Failed):  # stays first in line: asked again, it fails again
                self._ahead = [message]
                raise RuntimeError(
                    f"the search of request {message.request_id} failed with {message.error!r}; "
                    "no further search of this pool will be complete"
                ) from message.error
            taken.append(message)
        self._ahead = []
        self._num_left -= sum(found.final for found in taken)
        return taken

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until `due` has something to hand out or to raise.

        Args:
            timeout_s: wait no longer; None: as long as it takes.

        Returns:
            False when it has nothing: the time is up, all is done, or the pool does not run.
        """
        if not self._ahead and not self.done:
            with suppress(Empty):
                self._ahead.append(self._queue.get(self._is_running, timeout_s))
        return bool(self._ahead)

    @property
    def done(self) -> bool:
        """Whether `due` has handed out the last stage of every request."""
        return not self._num_left

    def close(self) -> None:
        """End the workers: those that wait at once, those that search after their stage."""
        self._stopped.set()
        if self._is_running:
            for thread in self._threads:
                thread.join()
        self._is_running = False

    def __enter__(self) -> SearchPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        while (wanted := self._next()) is not None:
            try:
                self._serve(wanted)
            except Exception as error:  # the reader is to hear of whatever it is
                self._queue.put(_Failed(wanted.request_id, error))
                self._stopped.set()

    def _next(self) -> Wanted | None:
        with self._taking:
            return None if self._stopped.is_set() else next(self._todo, None)

    def _serve(self, wanted: Wanted) -> None:
        stages = self._search.stages(wanted.query)
        self._sleep_until(self._start + wanted.arrival_s)
        begin_s = time.perf_counter() - self._start
        for stage in range(self._search.num_stages):
            earliest = time.perf_counter() + self._stage_s
            documents = () if self._stopped.is_set() else next(stages)
            self._sleep_until(earliest)
            if self._stopped.is_set():  # the stage was left out or cut short: it says nothing
                return
            instant_s = time.perf_counter() - self._start
            final = stage == self._search.num_stages - 1
            self._queue.put(Found(wanted.request_id, stage, documents, begin_s, instant_s, final))

    def _sleep_until(self, instant: float) -> None:
        """As `backends.arrivals.sleep_until`, but the end of the pool ends it."""
        while (left := instant - time.perf_counter()) > 0 and not self._stopped.wait(left):
            pass


def _check_requests(wanted: Sequence[Wanted]) -> None:
    seen: set[int] = set()
    for one in wanted:
        if one.request_id in seen:
            raise ValueError(f"request {one.request_id} is there twice; give each its own number")
        if not (isfinite(one.arrival_s) and one.arrival_s >= 0):
            raise ValueError(
                f"request {one.request_id}: arrival_s={one.arrival_s} must be finite and not "
                "negative; t = 0 is what `start` is given"
            )
        seen.add(one.request_id)
