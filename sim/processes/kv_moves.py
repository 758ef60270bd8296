"""How the KV of a prefilled request gets from one instance to another under simulated time."""

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple, Protocol

from simpy.events import Event

from sim.policies.instance_plan.base import kv_tokens
from sim.processes.replica import Replica
from sim.processes.router import RouterLog
from sim.recorder import RouteRecorder
from sim.requests import Request, RequestView
from sim.trace import Trace


class Transport(Protocol):
    """Carries KV between instances."""

    def send(self, source: int, target: int, num_bytes: int) -> Event:
        """An event that fires when so many bytes of one instance have arrived at another."""
        ...


class MoveTimes(NamedTuple):
    """When one hand-over went through its stages in another run: see `HAND_OVERS`."""

    instant_s: float
    announced_s: float
    delivered_s: float
    released_s: float
    known: int
    """Reports that the router knew of."""


class HandOverLog(NamedTuple):
    """Another run's hand-overs, for replay."""

    router: RouterLog
    moves: dict[int, MoveTimes]
    """By request."""

    @classmethod
    def of(cls, trace: Trace) -> "HandOverLog":
        """The log of a trace."""
        columns = {name: column.tolist() for name, column in trace.hand_overs.items()}
        names = ("instant_s", "announced_s", "delivered_s", "released_s", "answers")
        rows = zip(*(columns[name] for name in names), strict=True)
        moves = (MoveTimes(*row) for row in rows)
        return cls(RouterLog.of(trace), dict(zip(columns["request"], moves, strict=True)))


class Handed(NamedTuple):
    """A request that was handed to an instance."""

    request: Request
    view: RequestView
    source: int
    """The instance that holds its KV."""


class Mover:
    """Copies KV, or lets it arrive when another run logged it; frees it where it was."""

    def __init__(
        self, transport: Transport, kv_bytes_per_token: int, recorder: RouteRecorder,
        prefillers: Sequence[Replica], log: HandOverLog | None,
    ) -> None:  # fmt: skip
        self._transport, self._token_bytes = transport, kv_bytes_per_token
        self._recorder, self._log = recorder, log
        self._environment = prefillers[0].environment
        self._prefillers = {replica.number: replica for replica in prefillers}

    def begins(self, handed: Handed) -> None:
        """The target has given blocks to a request."""
        self._recorder.moved(handed.request.request_id, "fetched_s", self._environment.now)

    def move(self, handed: Handed, target: int) -> Generator[Event, Any, None]:
        """Fetch; when it ends, the KV is at the target."""
        request_id, environment = handed.request.request_id, self._environment
        if self._log is not None:
            moves = self._log.moves[request_id]
            yield environment.arrival(max(moves.delivered_s, environment.now))
            environment.process(self._release_at(handed, moves.released_s))
        else:
            num_bytes = kv_tokens(handed.view) * self._token_bytes
            yield self._transport.send(handed.source, target, num_bytes)
            self._release(handed)
        self._recorder.moved(request_id, "delivered_s", environment.now)

    def _release_at(self, handed: Handed, instant_s: float) -> Generator[Event, Any, None]:
        yield self._environment.arrival(max(instant_s, self._environment.now))
        self._release(handed)

    def _release(self, handed: Handed) -> None:
        request_id = handed.request.request_id
        source = self._prefillers[handed.source]
        source.notice(lambda: source.state.release(request_id), always=False)
        self._recorder.moved(request_id, "released_s", self._environment.now)
