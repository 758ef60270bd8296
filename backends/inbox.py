"""The far end of a router's connection: requests come in, answers and signs of life go out."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from sim.requests import Request

BEAT_S = 1.0
"""A replica shows that it lives so often, also in the middle of a forward pass."""


class Inbox:
    """A `Feed` whose requests are sent by a router in another process."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._ended = False
        self.delivered_s: dict[int, float] = {}
        """When each request was taken out of the connection."""
        self._beat = threading.Thread(target=self._beats, daemon=True)
        self._quiet = threading.Event()

    def send(self, kind: str, content: Any = None) -> None:
        """Send one message; any thread may."""
        with self._lock:
            self._connection.send((kind, content))

    def begin(self) -> float:
        """Say that all is ready, and wait for the clock's reading at t = 0."""
        self.send("ready")
        self._beat.start()
        kind, start = self._connection.recv()
        assert kind == "start", f"the router sent {kind!r} before the start"
        return start

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
                self._ended = True
                break
            request = self.received(content)
            self.delivered_s[request.request_id] = time.perf_counter() - start
            requests.append(request)
        return time.perf_counter() - start, requests

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
        if not self._ended:
            self.send("idle", len(self.delivered_s))
            self._connection.poll(None)
        return not self._ended

    def answered(self, request_id: int, finish_s: float) -> None:
        """Tell the router of an answer."""
        self.send("answer", (request_id, finish_s))

    def _beats(self) -> None:
        while not self._quiet.wait(BEAT_S):
            self.send("alive")
