"""A router whose replicas die and come back: what they leave unanswered is routed again."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from simpy.events import Event

from sim.engine import ReplicaLimits
from sim.faults import Outage
from sim.policies.batching.base import Batching
from sim.policies.routing.base import Routing, checked_choice
from sim.processes.exact_time import ExactEnvironment
from sim.processes.pace import Pace
from sim.processes.replica import Feed, Replica
from sim.processes.router import Router
from sim.recorder import Recorder
from sim.requests import Request
from sim.trace import State, Trace
from sim.trace_lives import joined_lives
from sim.trace_merge import merge
from sim.workload.source import Source

Made = Callable[[int], Replica]
"""Makes a replica that begins now, empty, given its number."""


class Failures(NamedTuple):
    """When replicas die, and when their router knows."""

    outages: Sequence[Outage]
    detection_s: float
    """From a death to the instant at which the router knows of it, unless the replica is back
    before."""


class FailoverRouter(Router):
    """Sends requests to replicas that it believes to live, and again when it learns otherwise.

    Requests wait here, in order, while nobody lives. Those that a dead replica had are routed again
    in the order in which they were sent there; they go on after the tokens that were handed out.
    """

    def __init__(
        self, environment: ExactEnvironment, routing: Routing, make: Made, num_replicas: int
    ) -> None:
        super().__init__(environment, routing, [make(at) for at in range(num_replicas)])
        self.lives: list[list[Replica]] = [[one] for one in self.replicas]
        """Of every replica, the present one last."""
        self.waiting: deque[int] = deque()
        """Requests that are to be sent."""
        self._make = make
        self._requests: dict[int, Request] = {}
        """Those that have come and are not answered."""
        self._tokens: dict[int, int] = {}
        """Tokens of their answers that replicas handed out before they died."""
        self._dead: set[int] = set()

    def plan(self, failures: Failures) -> None:
        """Let replicas die and come back. Call it before anything else is planned.

        Faults then come before all else that happens at their instants: an iteration that would
        end with the death of its replica is lost.
        """
        for one in failures.outages:
            noticed_s = min(one.at_s + failures.detection_s, one.until_s)
            self._at(one.at_s, self.die, one.replica)
            self._at(noticed_s, self.notice, one.replica)
            if one.until_s < float("inf"):
                self._at(one.until_s, self.come_back, one.replica)

    def submit(self, request: Request) -> None:
        """Route a request that has arrived, as soon as somebody lives."""
        self._requests[request.request_id] = request
        self.waiting.append(request.request_id)
        self._send_waiting()

    def answered(self, request_id: int, instant_s: float) -> None:
        """A replica has completed an answer."""
        del self._requests[request_id]
        self._tokens.pop(request_id, None)
        super().answered(request_id, instant_s)

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
        self.waiting.extend(self.state.lost(number))
        self._send_waiting()

    def come_back(self, number: int) -> None:
        """A replica that died begins anew, with nothing, and the router knows at once."""
        self._dead.discard(number)
        self.lives[number].append(self._make(number))
        self.state.back(number)
        self._send_waiting()

    def traces(self) -> list[Trace]:
        """One trace a replica; their recorders are emptied."""
        found: list[Trace] = []
        for lives in self.lives:
            found.append(joined_lives([life.recorder.trace() for life in lives]))
            for life in lives:
                life.recorder = Recorder()  # what it held is in the trace
        return found

    def _send_waiting(self) -> None:
        while self.waiting and self.state.live:
            self._send(self._requests[self.waiting.popleft()], self.environment.now)

    def _send(self, request: Request, delivered_s: float) -> int:
        """Choose a replica and note it; the request is there at once."""
        tokens, now = self._tokens.get(request.request_id, 0), self.environment.now
        view = request.view(tokens)
        number = checked_choice(self.routing, self._memory, view, self.state, now)
        self.recorder.route(request.request_id, now, number, delivered_s, self.state, tokens)
        self.state.sent(view, number)
        self._deliver(request, number)
        return number

    def _deliver(self, request: Request, number: int) -> None:
        """A request reaches its replica, or what is left of it."""
        replica = self.lives[number][-1]
        if number in self._dead:
            replica.recorder.event(request.request_id, self.environment.now, State.lost)
        else:
            replica.submit(request, self._tokens.get(request.request_id, 0))

    def _at(self, instant_s: float, then: Callable[[int], Any], number: int) -> None:
        def call(event: Event) -> None:
            del event
            then(number)

        event = self.environment.arrival(instant_s)
        event.callbacks = [call]


def simulate_failures(  # noqa: PLR0913  what a deployment is made of
    source: Source,
    routing: Routing,
    batching: Batching,
    limits: ReplicaLimits,
    paces: Sequence[Pace],
    failures: Failures,
    *,
    one_by_one: bool = False,
    schedules_ahead: bool = False,
) -> Trace:
    """As `router.simulate_replicas`, of replicas that die and come back.

    Raises:
        ValueError: a policy breaks its rules, or leaves requests unserved.
    """
    environment = ExactEnvironment()
    feed = Feed(environment, source)

    def finished(request_id: int, instant_s: float) -> None:
        router.answered(request_id, instant_s)
        feed.answered(request_id, instant_s)

    def make(number: int) -> Replica:
        return Replica(
            environment, batching, limits, paces[number], one_by_one=one_by_one,
            schedules_ahead=schedules_ahead, finished=finished, number=number,
        )  # fmt: skip

    router = FailoverRouter(environment, routing, make, len(paces))
    router.plan(failures)
    feed.start(router.submit)
    environment.run()
    if router.unserved:
        raise ValueError(
            f"policy {type(batching).__name__} left {router.unserved} requests unserved and waits "
            "for arrivals that never come; mend the policy"
        )
    return merge(router.traces(), *router.recorder.tables())
