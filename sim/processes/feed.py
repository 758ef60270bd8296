"""Hands a source's requests to an executor under simulated time, each at its arrival."""

from collections.abc import Callable, Generator
from typing import Any

from simpy.events import Event

from sim.processes.exact_time import ExactEnvironment
from sim.requests import Request
from sim.workload.source import Source

Submit = Callable[[Request], None]
"""Takes a request at its arrival."""


def _nowhere(request: Request) -> None:
    raise AssertionError(f"request {request.request_id} came before the feed began")


class Feed:
    """Hands out a source's requests at their arrivals; in a closed loop, after an answer."""

    def __init__(self, environment: ExactEnvironment, source: Source) -> None:
        self._environment, self._source = environment, source
        self._submit: Submit = _nowhere

    def start(self, submit: Submit) -> None:
        """Begin to submit; after the executor's own processes, which sleep at the first arrival."""
        self._submit = submit
        self._environment.process(self._arrivals())

    def answered(self, request_id: int, instant_s: float) -> None:
        """A request has its last token; in a closed loop its client now issues the next one."""
        following = self._source.after(request_id, instant_s)
        if following is None:
            return
        if following.arrival_s <= instant_s:
            self._submit(following)
        else:
            self._environment.process(self._arrive(following))

    def _arrive(self, request: Request) -> Generator[Event, Any, None]:
        yield self._environment.arrival(request.arrival_s)
        self._submit(request)

    def _arrivals(self) -> Generator[Event, Any, None]:
        for request in self._source.initial():
            yield self._environment.arrival(request.arrival_s)
            self._submit(request)
