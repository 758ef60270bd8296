"""How the KV of a prefilled request gets from one instance to another under simulated time."""

from collections import defaultdict, deque
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, Protocol

from simpy.events import Event

from sim.placement import Placement
from sim.policies.instance_plan.base import kv_tokens
from sim.processes.exact_time import ExactEnvironment
from sim.processes.network import Network
from sim.processes.replica import Replica
from sim.processes.router import RouterLog
from sim.recorder import RouteRecorder
from sim.requests import Request, RequestView
from sim.state.links import Routes
from sim.trace import Trace


class Transport(Protocol):
    """Carries KV between instances."""

    def send(self, source: int, target: int, num_bytes: int) -> Event:
        """An event that fires when so many bytes of one instance have arrived at another."""
        ...


class NetworkTransport:
    """Every rank of an instance sends its share to the same rank of the other, over the network."""

    def __init__(self, environment: ExactEnvironment, placement: Placement) -> None:
        self._network = Network(environment, Routes(placement.hardware))
        self._placement = placement

    def send(self, source: int, target: int, num_bytes: int) -> Event:
        """See `Transport`."""
        ends = self._placement.ranks(source), self._placement.ranks(target)
        return self._network.transfer_all(*ends, num_bytes / self._placement.ranks_each)


class LinkTransport:
    """One link of a latency and a bandwidth into every instance, which fetches one at a time."""

    def __init__(self, environment: ExactEnvironment, latency_s: float, bytes_per_s: float) -> None:
        self._environment = environment
        self._latency_s, self._bytes_per_s = latency_s, bytes_per_s

    def send(self, source: int, target: int, num_bytes: int) -> Event:
        """See `Transport`."""
        del source, target
        seconds = self._latency_s + num_bytes / self._bytes_per_s
        return self._environment.arrival(self._environment.now + seconds)


class InstantTransport(LinkTransport):
    """Carries anything in no time: where a log says when it arrives."""

    def __init__(self, environment: ExactEnvironment) -> None:
        super().__init__(environment, 0.0, float("inf"))


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


Queue = deque[tuple[Handed, Callable[[], None]]]
"""What an instance has begun to fetch, and what is to be done when it is there."""


class Mover:
    """Copies KV, or lets it arrive when another run logged it; frees it where it was."""

    def __init__(
        self, transport: Transport, kv_bytes_per_token: int, recorder: RouteRecorder,
        prefillers: Sequence[Replica], log: HandOverLog | None,
    ) -> None:  # fmt: skip
        self._limits = prefillers[0].state.limits
        self._transport, self._token_bytes = transport, kv_bytes_per_token
        self._recorder, self._log = recorder, log
        self._environment = prefillers[0].environment
        self._queues: defaultdict[int, Queue] = defaultdict(deque)
        self._prefillers = {replica.number: replica for replica in prefillers}

    def fetch(self, handed: Handed, target: int, arrived: Callable[[], None]) -> None:
        """Begin to move the KV of a request to an instance that has given it blocks.

        An instance fetches one request after another, in the order of these calls.
        """
        self._recorder.moved(handed.request.request_id, "fetched_s", self._environment.now)
        if self._log is not None:
            moves = self._log.moves[handed.request.request_id]
            self._at(moves.released_s, lambda: self._release(handed))
            self._at(moves.delivered_s, lambda: self._deliver(handed, arrived))
            return
        queue = self._queues[target]
        queue.append((handed, arrived))
        if len(queue) == 1:
            self._environment.process(self._work_off(queue, target))

    def _work_off(self, queue: Queue, target: int) -> Generator[Event, Any, None]:
        """Move what is queued until nothing is."""
        while queue:
            handed, arrived = queue[0]
            tokens = self._limits.block_tokens(kv_tokens(handed.view))  # blocks move whole
            num_bytes = tokens * self._token_bytes
            yield self._transport.send(handed.source, target, num_bytes)
            queue.popleft()
            self._release(handed)
            self._deliver(handed, arrived)

    def _at(self, instant_s: float, then: Callable[[], None]) -> None:
        event = self._environment.arrival(max(instant_s, self._environment.now))

        def fired(_: Event) -> None:
            then()

        event.callbacks = [fired]

    def _deliver(self, handed: Handed, arrived: Callable[[], None]) -> None:
        self._recorder.moved(handed.request.request_id, "delivered_s", self._environment.now)
        arrived()

    def _release(self, handed: Handed) -> None:
        request_id = handed.request.request_id
        source = self._prefillers[handed.source]
        source.notice(lambda: source.state.release(request_id), always=False)
        self._recorder.moved(request_id, "released_s", self._environment.now)
