"""Requests of a source at their scheduled times on a real clock."""

import time
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from typing import Protocol

from sim.requests import Request
from sim.workload.source import Source


class Feed(Protocol):
    """Where a replica's requests come from. Instants are seconds since the clock read `start`."""

    def due(self, start: float) -> tuple[float, Sequence[Request]]:
        """The instant, and the requests that are there by then and were not handed out before."""
        ...

    def wait(self, start: float) -> bool:
        """Wait until a request may be there; False when none will come."""
        ...

    def answered(self, request_id: int, finish_s: float) -> None:
        """A request has its last token."""
        ...


class Arrivals:
    """Hands out requests that are due. Their arrival is the scheduled one, however late it is seen.

    A request that waits for a busy engine has waited since its scheduled time: nothing is omitted.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._initial: Iterator[Request] = source.initial()
        self._ahead = next(self._initial, None)
        self._issued: list[tuple[float, int, Request]] = []

    @property
    def next_s(self) -> float | None:
        """Arrival of the next request that is known; None when none is."""
        times = [self._issued[0][0]] if self._issued else []
        if self._ahead is not None:
            times.append(self._ahead.arrival_s)
        return min(times, default=None)

    def due(self, start: float) -> tuple[float, Sequence[Request]]:
        """Now, and the requests that have arrived."""
        now_s = time.perf_counter() - start
        return now_s, list(self.until(now_s))

    def wait(self, start: float) -> bool:
        """Sleep until the next request; False when none is known."""
        if self.next_s is None:
            return False
        sleep_until(start + self.next_s)
        return True

    def until(self, now_s: float) -> Iterator[Request]:
        """The requests that arrived by `now_s`, in order of arrival."""
        while True:
            issued_s = self._issued[0][0] if self._issued else float("inf")
            if self._ahead is not None and self._ahead.arrival_s <= min(now_s, issued_s):
                request, self._ahead = self._ahead, next(self._initial, None)
                yield request
            elif issued_s <= now_s:
                yield heappop(self._issued)[2]
            else:
                return

    def answered(self, request_id: int, finish_s: float) -> None:
        """A request has its last token; in a closed loop its client now issues the next one."""
        following = self._source.after(request_id, finish_s)
        if following is not None:
            heappush(self._issued, (following.arrival_s, following.request_id, following))


def sleep_until(instant: float) -> None:
    """Sleep until `time.perf_counter()` reads `instant`."""
    while (left := instant - time.perf_counter()) > 0:
        time.sleep(left)
