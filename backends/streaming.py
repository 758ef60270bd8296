"""An inbox that hands out every token, and every row of the trace, as soon as it is there.

A process that is killed has then told all that it had done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from types import MappingProxyType
from typing import Any, NamedTuple

from backends.inbox import Command, Inbox
from backends.replica import Replica
from backends.slow_model import SlowModel
from sim.requests import Request
from sim.slowness import SlowTimes


class Step(NamedTuple):
    """What an iteration has brought."""

    tokens: dict[int, list[int]]
    """New tokens of each answer."""
    finished: list[tuple[int, float]]
    """Requests whose answer is complete, and when it was."""
    news: dict[str, bytes]
    """Of the trace: see `Recorder.news`."""
    delivered_s: dict[int, float]
    """When requests were taken out of the connection that the iteration could see."""
    kv_bytes: tuple[int, int]
    """Written and read since the start of the process."""


class StreamingInbox(Inbox):
    """Sends one message an iteration; requests may come with tokens that they go on after."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._replica: Replica | None = None
        self._known: dict[str, int] = {}
        self._handed_out: dict[int, int] = {}
        self._finished: list[tuple[int, float]] = []
        self._delivered: dict[int, float] = {}

    def attach(self, replica: Replica, spec: Any) -> None:
        """Learn whose tokens are to be sent, and slow it down where the spec's faults say so."""
        self._replica = replica
        mine = [one for one in spec.faults if one.replica == replica.recorder.replica]
        if any(not one.kills for one in mine):
            replica.model = SlowModel(replica.model, SlowTimes(mine, [1]))

    def begin(self, commands: Mapping[str, Command] = MappingProxyType({})) -> float | None:
        """Wait for t = 0."""
        start = super().begin(commands)
        model = None if self._replica is None else self._replica.model
        if start is not None and isinstance(model, SlowModel):
            model.start = start
        return start

    def due(self, start: float) -> tuple[float, Sequence[Request]]:
        """Send what the iteration before has brought; then as any inbox."""
        self._flush()
        now_s, requests = super().due(start)
        self._delivered |= {one.request_id: self.delivered_s[one.request_id] for one in requests}
        return now_s, requests

    def received(self, content: Any) -> Request:
        """The request of a message, which may have tokens already."""
        fields, tokens = content
        request = Request(*fields)
        assert self._replica is not None
        self._handed_out[request.request_id] = len(tokens)
        if tokens:
            self._replica.resume(request.request_id, tokens)
        return request

    def answered(self, request_id: int, finish_s: float) -> None:
        """Tell of an answer with its last token, not before."""
        self._finished.append((request_id, finish_s))

    def _flush(self) -> None:
        replica = self._replica
        assert replica is not None
        done = {request_id: replica.answers[request_id] for request_id, _ in self._finished}
        tokens: dict[int, list[int]] = {}
        for request_id, answer in {**replica.answers_so_far(), **done}.items():
            if new := answer[self._handed_out[request_id] :]:
                tokens[request_id] = new
                self._handed_out[request_id] = len(answer)
        if not tokens and replica.recorder.num_iterations == self._known.get("end", 0):
            return  # no iteration since
        news = replica.recorder.news(self._known)
        cache = replica.cache
        kv_bytes = (cache.written_bytes, cache.read_bytes)
        self.send("step", Step(tokens, self._finished, news, self._delivered, kv_bytes))
        self._finished, self._delivered = [], {}
