"""A router before several replicas under simulated time: choose one at each arrival."""

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

from simpy.events import Event

from sim.engine import ReplicaLimits
from sim.policies.batching.base import Batching
from sim.policies.routing.base import Routing, checked_choice
from sim.processes.exact_time import ExactEnvironment
from sim.processes.pace import Pace
from sim.processes.replica import Feed, Replica
from sim.recorder import Recorder, RouteRecorder
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
    answers: Sequence[int]
    """Requests in the order in which it learnt of their answers."""


class Router:
    """Sends every request where the policy says, and keeps count of the answers."""

    def __init__(
        self,
        environment: ExactEnvironment,
        routing: Routing,
        replicas: Sequence[Replica],
        log: RouterLog | None = None,
    ) -> None:
        self.environment = environment
        self.routing = routing
        self.replicas = replicas
        limits = replicas[0].state.limits
        self.state = RouterState(len(replicas), limits.num_blocks * limits.block_size)
        self.recorder = RouteRecorder()
        self._memory = routing.init()
        self._log = log
        self._num_submitted = 0

    def submit(self, request: Request) -> None:
        """Route a request that has arrived."""
        if self._log is None:
            replica = self._route(request, self.environment.now)
            self.replicas[replica].submit(request)
        else:
            self.environment.process(self._replay(request, self._num_submitted, self._log))
        self._num_submitted += 1

    def answered(self, request_id: int, instant_s: float) -> None:
        """A replica has completed an answer."""
        if self._log is None:  # in replay the log says when the router learns of it
            self.state.answered(request_id)
            self.recorder.answer(request_id, instant_s)

    def _route(self, request: Request, delivered_s: float) -> int:
        """Choose, and note what was chosen."""
        view, now = request.view(), self.environment.now
        replica = checked_choice(self.routing, self._memory, view, self.state, now)
        self.recorder.route(request.request_id, now, replica, delivered_s, self.state)
        self.state.sent(view, replica)
        return replica

    def _replay(self, request: Request, index: int, log: RouterLog) -> Generator[Event, Any, None]:
        """Route a request when the logged router did, knowing what that one knew."""
        environment = self.environment
        yield environment.arrival(max(log.instants_s[index], environment.now))
        for request_id in log.answers[self.recorder.num_answers : log.known[index]]:
            if not self.state.is_outstanding(request_id):
                break  # the panels have parted; the counts will say so
            self.state.answered(request_id)
            self.recorder.answer(request_id, environment.now)
        replica = self._route(request, log.delivered_s[index])
        yield environment.arrival(max(log.delivered_s[index], environment.now))
        self.replicas[replica].submit(request)


def simulate_replicas(  # noqa: PLR0913  what a deployment is made of
    source: Source,
    routing: Routing,
    batching: Batching,
    limits: ReplicaLimits,
    paces: Sequence[Pace],
    *,
    one_by_one: bool = False,
    schedules_ahead: bool = False,
    log: RouterLog | None = None,
) -> Trace:
    """Serve all requests of a source on several equal replicas behind a router.

    Args:
        source: as of `replica.simulate`.
        routing: chooses a replica for every request.
        batching: decides every iteration of each replica.
        limits: of each engine.
        paces: how long iterations last, one a replica.
        one_by_one: ask the batching policy at every iteration.
        schedules_ahead: as of `replica.simulate`.
        log: of another run's router, whose instants and knowledge are taken over.

    Raises:
        ValueError: a policy breaks its rules, or leaves requests unserved.
    """
    environment = ExactEnvironment()
    feed = Feed(environment, source)

    def finished(request_id: int, instant_s: float) -> None:
        router.answered(request_id, instant_s)
        feed.answered(request_id, instant_s)

    replicas = [
        Replica(
            environment, batching, limits, pace, one_by_one=one_by_one,
            schedules_ahead=schedules_ahead, finished=finished, number=number,
        )
        for number, pace in enumerate(paces)
    ]  # fmt: skip
    router = Router(environment, routing, replicas, log)
    feed.start(router.submit)
    environment.run()
    unserved = sum(len(one.state.waiting) + one.state.num_running for one in replicas)
    if unserved:
        raise ValueError(
            f"policy {type(batching).__name__} left {unserved} requests unserved and waits for "
            "arrivals that never come; mend the policy"
        )
    traces: list[Trace] = []
    for replica in replicas:
        traces.append(replica.recorder.trace())
        replica.recorder = Recorder()  # what it held is in the trace
    return merge(traces, *router.recorder.tables())
