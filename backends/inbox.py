"""The far end of a router's connection: requests come in, answers and signs of life go out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from types import MappingProxyType
from typing import Any, NamedTuple

from sim.requests import Request

BEAT_S = 1.0
"""A replica shows that it lives so often, also in the middle of a forward pass."""


Command = Callable[[Any], Any]
"""Answers one kind of message."""


class Event(NamedTuple):
    """Something other than a request that came in."""

    kind: str
    content: Any
    seen_s: float
    """When it was taken out of its connection."""


class Inbox:
    """A `Feed` whose requests are sent by a router in another process."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._local: Connection | None = None
        self.expects_more: Callable[[], bool] = lambda: False
        """Whether something is under way that `local` will tell of."""
        self._events: list[Event] = []
        self._num_sent = 0
        self._lock = threading.Lock()
        self._ended = False
        self.is_complete = True
        """Whether every request has its answer; known at the end."""
        self.delivered_s: dict[int, float] = {}
        """When each request was taken out of the connection."""
        self._beat = threading.Thread(target=self._beats, daemon=True)
        self._quiet = threading.Event()

    def send(self, kind: str, content: Any = None) -> None:
        """Send one message; any thread may."""
        with self._lock:
            self._connection.send((kind, content))

    def begin(self, commands: Mapping[str, Command] = MappingProxyType({})) -> float | None:
        """Say that all is ready, and wait for the clock's reading at t = 0; None: there is no run.

        Args:
            commands: what else may be asked for before it; what each returns is sent back.
        """
        self._events, self._num_sent, self._ended = [], 0, False
        self.delivered_s = {}
        self.send("ready")
        if not self._beat.is_alive():
            self._beat.start()
        while True:
            kind, content = self._connection.recv()
            if kind == "start":
                return content
            if kind == "stop":
                return None
            self.send("result", commands[kind](content))

    def listen(self, local: Connection) -> None:
        """Listen to other threads of this process as well."""
        self._local = local

    @property
    def has_ended(self) -> bool:
        """Whether the router has said that nothing more will come."""
        return self._ended

    def await_close(self) -> None:
        """Wait until the router has closed the connection."""
        with suppress(EOFError, ConnectionResetError):
            self._connection.recv()

    def end(self) -> None:
        """No more signs of life."""
        self._quiet.set()
        self._beat.join()

    def due(self, start: float) -> tuple[float, Sequence[Request]]:
        """The requests that are here, and the instant after the last of them was taken."""
        requests: list[Request] = []
        while not self._ended and self._connection.poll():
            kind, content = self._connection.recv()
            if kind == "end":
                self._ended, self.is_complete = True, content
                break
            self._num_sent += 1
            seen_s = time.perf_counter() - start
            if kind == "request":
                request = self.received(content)
                self.delivered_s[request.request_id] = seen_s
                requests.append(request)
            else:
                self._events.append(Event(kind, content, seen_s))
        while self._local is not None and self._local.poll():
            kind, content = self._local.recv()
            self._events.append(Event(kind, content, time.perf_counter() - start))
        return time.perf_counter() - start, requests

    def events(self) -> list[Event]:
        """What else had come in by the instant that `due` gave last."""
        taken, self._events = self._events, []
        return taken

    def received(self, content: Any) -> Request:
        """The request of a message."""
        return Request(*content)

    def attach(self, replica: Any, spec: Any) -> None:
        """Learn who is served, before `begin`. Here nothing follows from it."""

    def wait(self, start: float) -> bool:
        """Wait for a message; False when the router has said that none will come.

        The router learns that nothing is done here until it sends something.
        """
        del start
        if self.is_complete and self.expects_more():
            assert self._local is not None
            wait([self._local] if self._ended else [self._connection, self._local])
            return True
        if not self._ended:
            self.send("idle", self._num_sent)
            wait([self._connection, *([] if self._local is None else [self._local])])
        return not self._ended

    def answered(self, request_id: int, finish_s: float) -> None:
        """Tell the router of an answer."""
        self.send("answer", (request_id, finish_s))

    def _beats(self) -> None:
        # Whoever listened may be gone before it has said that nothing more will come.
        with suppress(BrokenPipeError, ConnectionResetError):
            while not self._quiet.wait(BEAT_S):
                self.send("alive")
