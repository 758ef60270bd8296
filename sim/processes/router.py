"""A router before several replicas under simulated time: choose one at each arrival."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from simpy.events import Event

from sim.engine import ReplicaLimits
from sim.policies.batching.base import Batching
from sim.policies.routing.base import Routing, checked_choice
from sim.processes.exact_time import ExactEnvironment
from sim.processes.feed import Feed
from sim.processes.pace import Pace
from sim.processes.replica import Replica
from sim.recorder import Choice, Recorder, RouteRecorder
from sim.requests import Request
from sim.state.router_state import RouterState
from sim.trace import Trace
from sim.trace_merge import merge
from sim.workload.source import Source


class RouterLog(NamedTuple):
    """What another run's router saw and when, for replay: see `ROUTES` and `ANSWERS`."""

    instants_s: Sequence[float]
    """When each request was routed, in order."""
    delivered_s: Sequence[float]
    """When its replica had it."""
    known: Sequence[int]
    """Of how many answers the router knew then."""
    answers: Sequence[tuple[int, int]]
    """(request, replica that reported it done), in the order in which it learnt of them."""

    @classmethod
    def of(cls, trace: Trace) -> "RouterLog":
        """The log of a trace."""
        routes, answers = trace.routes, trace.answers
        return cls(
            routes["instant_s"].tolist(), routes["delivered_s"].tolist(),
            routes["answers"].tolist(),
            list(zip(answers["request"].tolist(), answers["replica"].tolist(), strict=True)),
        )  # fmt: skip


class Reports:
    """What replicas have reported done, and what is therefore taken to be outstanding."""

    def __init__(
        self, recorder: RouteRecorder, answers: Sequence[tuple[int, int]] | None = None
    ) -> None:
        """Take over another run's reports for replay; None: what comes in counts at once."""
        self._recorder = recorder
        self._answers = answers
        self._states: dict[int, RouterState] = {}

    def watch(self, state: RouterState, numbers: Sequence[int]) -> None:
        """Let a state know of what these replicas report."""
        self._states |= dict.fromkeys(numbers, state)

    def done(self, request_id: int, replica: int, instant_s: float) -> None:
        """A replica has done its part of a request."""
        if self._answers is None:  # in replay the log says when it becomes known
            self._note(request_id, replica, instant_s)

    def known(self, count: int, instant_s: float) -> None:
        """Know of the first `count` reports of the log."""
        assert self._answers is not None
        for request_id, replica in self._answers[self._recorder.num_answers : count]:
            if not self._states[replica].is_outstanding(request_id):
                break  # the panels have parted; the counts will say so
            self._note(request_id, replica, instant_s)

    def _note(self, request_id: int, replica: int, instant_s: float) -> None:
        self._states[replica].answered(request_id)
        self._recorder.answer(request_id, instant_s, replica)


class Router:
    """Sends every request where the policy says, and keeps count of the answers."""

    def __init__(
        self,
        routing: Routing,
        replicas: Sequence[Replica],
        recorder: RouteRecorder,
        reports: Reports,
        log: RouterLog | None = None,
    ) -> None:
        self.environment = replicas[0].environment
        self.routing = routing
        self.replicas = replicas
        self.numbers = [replica.number for replica in replicas]
        limits = replicas[0].state.limits
        self.state = RouterState(len(replicas), limits.num_blocks * limits.block_size)
        reports.watch(self.state, self.numbers)
        self._recorder, self._reports, self._log = recorder, reports, log
        self._memory = routing.init()
        self._num_submitted = 0

    def submit(self, request: Request) -> None:
        """Route a request that has arrived."""
        if self._log is None:
            replica = self._route(request, self.environment.now)
            self.replicas[replica].submit(request)
        else:
            self.environment.process(self._replay(request, self._num_submitted, self._log))
        self._num_submitted += 1

    def _route(self, request: Request, delivered_s: float) -> int:
        """Choose, and note what was chosen."""
        view, now = request.view(), self.environment.now
        replica = checked_choice(self.routing, self._memory, view, self.state, now)
        choice = Choice.of(replica, self.state, self.numbers)
        self._recorder.route(request.request_id, now, choice, delivered_s)
        self.state.sent(view, replica)
        return replica

    def _replay(self, request: Request, index: int, log: RouterLog) -> Generator[Event, Any, None]:
        """Route a request when the logged router did, knowing what that one knew."""
        environment = self.environment
        yield environment.arrival(max(log.instants_s[index], environment.now))
        self._reports.known(log.known[index], environment.now)
        replica = self._route(request, log.delivered_s[index])
        yield environment.arrival(max(log.delivered_s[index], environment.now))
        self.replicas[replica].submit(request)


@dataclass(frozen=True, kw_only=True)
class Engines:
    """What every replica of a deployment is made of."""

    batching: Batching
    """Decides every iteration."""
    limits: ReplicaLimits
    paces: Sequence[Pace]
    """How long iterations last, one a replica."""
    one_by_one: bool = False
    """Ask the batching policy at every iteration."""
    schedules_ahead: bool = False
    """As of `replica.simulate`."""

    def replica(self, environment: ExactEnvironment, number: int, **ends: Any) -> Replica:
        """The replica with a number; `ends` says what it is joined to."""
        return Replica(
            environment, self.batching, ends.pop("limits", self.limits), self.paces[number],
            one_by_one=self.one_by_one, schedules_ahead=self.schedules_ahead, number=number, **ends,
        )  # fmt: skip

    def require_served(self, replicas: Sequence[Replica]) -> None:
        """Refuse an end that leaves requests behind.

        Raises:
            ValueError: a policy schedules nothing although no request will come any more.
        """
        unserved = sum(one.state.num_unfinished for one in replicas)
        if unserved:
            raise ValueError(
                f"policy {type(self.batching).__name__} left {unserved} requests unserved and "
                "waits for arrivals that never come; mend the policy"
            )


def simulate_replicas(
    source: Source, routing: Routing, engines: Engines, log: RouterLog | None = None
) -> Trace:
    """Serve all requests of a source on several equal replicas behind a router.

    Args:
        source: as of `replica.simulate`.
        routing: chooses a replica for every request.
        engines: the replicas.
        log: of another run's router, whose instants and knowledge are taken over.

    Raises:
        ValueError: a policy breaks its rules, or leaves requests unserved.
    """
    environment = ExactEnvironment()
    feed = Feed(environment, source)
    recorder = RouteRecorder()
    reports = Reports(recorder, None if log is None else log.answers)

    def replica(number: int) -> Replica:
        def finished(request_id: int, instant_s: float) -> None:
            reports.done(request_id, number, instant_s)
            feed.answered(request_id, instant_s)

        return engines.replica(environment, number, finished=finished)

    replicas = [replica(number) for number in range(len(engines.paces))]
    router = Router(routing, replicas, recorder, reports, log)
    feed.start(router.submit)
    environment.run()
    engines.require_served(replicas)
    return merge(traces_of(replicas), *recorder.tables())


def traces_of(replicas: Sequence[Replica]) -> list[Trace]:
    """What each replica recorded, which it forgets."""
    traces: list[Trace] = []
    for replica in replicas:
        traces.append(replica.recorder.trace())
        replica.recorder = Recorder()  # what it held is in the trace
    return traces
