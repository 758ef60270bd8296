"""A router whose replicas die and come back: what they leave unanswered is routed again."""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from math import inf
from typing import Any, NamedTuple

from simpy.events import Event

from sim.engine import ReplicaLimits
from sim.faults import Outage
from sim.policies.batching.base import Batching
from sim.policies.routing.base import Routing, checked_choice
from sim.processes.exact_time import ExactEnvironment
from sim.processes.feed import Feed
from sim.processes.pace import Pace
from sim.processes.replica import Replica
from sim.processes.router import Reports, Router, RouterLog
from sim.recorder import Choice, Recorder, RouteRecorder
from sim.requests import Request
from sim.trace import State, Trace
from sim.trace_lives import joined_lives
from sim.trace_merge import merge
from sim.workload.source import Source

Made = Callable[[int, int], Replica]
"""Makes a replica that begins now, empty, given its number and that of its life."""


PaceOf = Callable[[int, int], Pace]
"""Of a replica and its life, both by number from 0."""


class Failures(NamedTuple):
    """When replicas die, and when their router knows."""

    outages: Sequence[Outage]
    noticed_s: Sequence[float]
    """Of each death, when the router learns of it."""

    @classmethod
    def detected(cls, outages: Sequence[Outage], detection_s: float) -> "Failures":
        """Noticed after so long, or when the replica is back, if that is before."""
        return cls(outages, [min(one.at_s + detection_s, one.until_s) for one in outages])


class FailoverLog(NamedTuple):
    """What another run's router saw and when, for replay."""

    router: RouterLog
    requests: Sequence[int]
    """Which request each of its choices was about."""
    known: Sequence[int]
    """Of each death, of how many answers the router knew when it learnt of it."""


class FailoverRouter(Router):
    """Sends requests to replicas that it believes to live, and again when it learns otherwise.

    Requests wait here, in order, while nobody lives. Those that a dead replica had are routed again
    in the order in which they were sent there; they go on after the tokens that were handed out.
    """

    def __init__(
        self, routing: Routing, make: Made, num_replicas: int, log: FailoverLog | None = None
    ) -> None:
        replicas = [make(at, 0) for at in range(num_replicas)]
        self.recorder = RouteRecorder()
        self._reports = Reports(self.recorder, log.router.answers if log else None)
        super().__init__(
            routing, replicas, self.recorder, self._reports, log.router if log else None
        )
        self.lives: list[list[Replica]] = [[one] for one in self.replicas]
        """Of every replica, the present one last."""
        self.waiting: deque[int] = deque()
        """Requests that are to be sent."""
        self._make = make
        self._known = deque(log.known if log else ())
        self._requests: dict[int, Request] = {}
        """Those that have come and are not answered."""
        self._tokens: dict[int, int] = {}
        """Tokens of their answers that replicas handed out before they died."""
        self._dead: set[int] = set()

    def plan(self, failures: Failures) -> None:
        """Let replicas die and come back. Call it before anything else is planned.

        Faults then come before all else that happens at their instants: an iteration that would
        end with the death of its replica is lost. Deaths come first, and what waits is sent when
        all that the router learns at an instant is known.
        """
        for one in failures.outages:
            self._at(one.at_s, self.die, one.replica)
        for one, noticed_s in zip(*failures, strict=True):
            self._at(noticed_s, self.notice, one.replica)
        returns = [one for one in failures.outages if one.until_s < inf]
        for one in returns:
            self._at(one.until_s, self.come_back, one.replica)
        for instant_s in (*failures.noticed_s, *(one.until_s for one in returns)):
            self._at(instant_s, self._send_waiting)

    def submit(self, request: Request) -> None:
        """Route a request that has arrived, as soon as somebody lives."""
        self._requests[request.request_id] = request
        self.waiting.append(request.request_id)
        self._send_waiting()

    def answered(self, request_id: int, number: int, instant_s: float) -> None:
        """A replica has completed an answer."""
        del self._requests[request_id]
        self._tokens.pop(request_id, None)
        self._reports.done(request_id, number, instant_s)

    @property
    def unserved(self) -> int:
        """Requests without a complete answer."""
        return len(self._requests)

    def die(self, number: int) -> None:
        """A replica dies; nobody knows yet."""
        self._tokens.update(self.lives[number][-1].die())
        self._dead.add(number)

    def notice(self, number: int) -> None:
        """The router learns of a death: what was sent there is to be sent again."""
        if self._known:
            self._reports.known(self._known.popleft(), self.environment.now)
        self.waiting.extend(self.state.lost(number))

    def come_back(self, number: int) -> None:
        """A replica that died begins anew, with nothing, and the router knows at once."""
        self._dead.discard(number)
        self.lives[number].append(self._make(number, len(self.lives[number])))
        self.state.back(number)

    def traces(self) -> list[Trace]:
        """One trace a replica; their recorders are emptied."""
        found: list[Trace] = []
        for lives in self.lives:
            found.append(joined_lives([life.recorder.trace() for life in lives]))
            for life in lives:
                life.recorder = Recorder()  # what it held is in the trace
        return found

    def replay(self, log: FailoverLog) -> Generator[Event, Any, None]:
        """Send each request when the logged router did, knowing what that one knew."""
        environment, router = self.environment, log.router
        rows = zip(log.requests, router.instants_s, router.delivered_s, router.known, strict=True)
        for request_id, instant_s, delivered_s, known in rows:
            yield environment.arrival(max(instant_s, environment.now))
            yield environment.arrival(environment.now)  # behind who arrives at this very instant
            self._reports.known(known, environment.now)
            known_here = request_id in self.waiting and request_id in self._requests
            if not (known_here and self.state.live):
                continue  # the panels have parted; the counts will say so
            self.waiting.remove(request_id)
            request = self._requests[request_id]
            number = self._choose(request, delivered_s)
            environment.process(self._deliver_at(delivered_s, request, number))

    def _send_waiting(self) -> None:
        """Send what waits, unless a log says when."""
        while self._log is None and self.waiting and self.state.live:
            request = self._requests[self.waiting.popleft()]
            self._deliver(request, self._choose(request, self.environment.now))

    def _choose(self, request: Request, delivered_s: float) -> int:
        """Choose a replica, and note it."""
        tokens, now = self._tokens.get(request.request_id, 0), self.environment.now
        view = request.view(tokens)
        number = checked_choice(self.routing, self._memory, view, self.state, now)
        choice = Choice.of(number, self.state, self.numbers)
        self.recorder.route(request.request_id, now, choice, delivered_s, tokens)
        self.state.sent(view, number)
        return number

    def _deliver_at(
        self, instant_s: float, request: Request, number: int
    ) -> Generator[Event, Any, None]:
        yield self.environment.arrival(max(instant_s, self.environment.now))
        self._deliver(request, number)

    def _deliver(self, request: Request, number: int) -> None:
        """A request reaches its replica, or what is left of it."""
        replica = self.lives[number][-1]
        if number in self._dead:
            replica.recorder.event(request.request_id, self.environment.now, State.lost)
        else:
            replica.submit(request, self._tokens.get(request.request_id, 0))

    def _at(self, instant_s: float, then: Callable[..., None], *numbers: int) -> None:
        def call(event: Event) -> None:
            del event
            then(*numbers)

        event = self.environment.arrival(instant_s)
        event.callbacks = [call]


def simulate_failures(  # noqa: PLR0913  what a deployment is made of
    source: Source,
    routing: Routing,
    batching: Batching,
    limits: ReplicaLimits,
    pace_of: PaceOf,
    failures: Failures,
    *,
    num_replicas: int,
    one_by_one: bool = False,
    schedules_ahead: bool = False,
    log: FailoverLog | None = None,
) -> Trace:
    """As `router.simulate_replicas`, of replicas that die and come back.

    Args:
        source: as of `replica.simulate`.
        routing: chooses a replica for every request, among those that live.
        batching: decides every iteration; begins anew in each life.
        limits: of each engine.
        pace_of: how long iterations last.
        failures: who dies and comes back.
        num_replicas: behind the router.
        one_by_one: ask the batching policy at every iteration.
        schedules_ahead: as of `replica.simulate`.
        log: of another run's router, whose instants and knowledge are taken over.

    Raises:
        ValueError: a policy breaks its rules, or leaves requests unserved.
    """
    environment = ExactEnvironment()
    feed = Feed(environment, source)

    def make(number: int, life: int) -> Replica:
        def finished(request_id: int, instant_s: float) -> None:
            router.answered(request_id, number, instant_s)
            feed.answered(request_id, instant_s)

        return Replica(
            environment, batching, limits, pace_of(number, life), one_by_one=one_by_one,
            schedules_ahead=schedules_ahead, finished=finished, number=number,
        )  # fmt: skip

    router = FailoverRouter(routing, make, num_replicas, log)
    router.plan(failures)
    if log is not None:
        environment.process(router.replay(log))
    feed.start(router.submit)
    environment.run()
    if router.unserved:
        raise ValueError(
            f"policy {type(batching).__name__} left {router.unserved} requests unserved and waits "
            "for arrivals that never come; mend the policy"
        )
    return merge(router.traces(), *router.recorder.tables())
