"""Prefill and decode on separate instances under simulated time: KV moves from one to the other."""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any

from simpy.events import Event

from sim.policies.instance_plan.base import (
    InstancePlan,
    checked_hand_over,
    kv_tokens,
    phases,
    unfetched_text,
)
from sim.policies.routing.base import Routing
from sim.processes.exact_time import ExactEnvironment
from sim.processes.feed import Feed
from sim.processes.hooks import Finished
from sim.processes.kv_moves import Handed, HandOverLog, Mover, MoveTimes, Transport
from sim.processes.replica import Replica
from sim.processes.router import Engines, Reports, Router, traces_of
from sim.recorder import Choice, RouteRecorder
from sim.requests import Request
from sim.state.router_state import RouterState
from sim.trace import State, Trace
from sim.trace_merge import merge
from sim.workload.source import Source


class DecodeInlet:
    """The requests handed to one instance that decodes, until they run there."""

    def __init__(self, plan: InstancePlan, mover: Mover) -> None:
        self._plan, self._memory, self._mover = plan, plan.init(), mover
        self._handed: deque[Handed] = deque()
        self._arrived: deque[Handed] = deque()

    @property
    def num_handed(self) -> int:
        """Requests whose KV has not begun to move."""
        return len(self._handed)

    def announce(self, handed: Handed) -> None:
        """A request was handed over."""
        self._handed.append(handed)

    def take(self, replica: Replica) -> None:
        """Seat the requests whose KV has come, and decide whose is fetched now."""
        state, now = replica.state, replica.environment.now
        while self._arrived and state.num_running < state.limits.max_num_seqs:
            handed = self._arrived.popleft()
            replica.seat(handed.view, kv_tokens(handed.view))
        if not self._handed:
            return
        views = [handed.view for handed in self._handed]
        for _ in range(self._plan.fetch(self._memory, views, state)):
            handed = self._handed.popleft()
            state.reserve(handed.request, kv_tokens(handed.view))
            if state.free_blocks < 0:
                raise ValueError(
                    f"policy {type(self._plan).__name__} at {now} s: request "
                    f"{handed.request.request_id} is fetched into blocks that are not free; "
                    "mend the policy"
                )
            replica.recorder.event(handed.request.request_id, now, State.admitted)
            self._fetch(replica, handed)

    def _fetch(self, replica: Replica, handed: Handed) -> None:
        def arrived() -> None:
            replica.notice(lambda: self._arrived.append(handed))

        self._mover.fetch(handed, replica.number, arrived)


class HandOvers:
    """Decides who decodes what was prefilled, and moves its KV."""

    def __init__(
        self,
        plan: InstancePlan,
        decoders: Sequence[Replica],
        inlets: Sequence[DecodeInlet],
        recorder: RouteRecorder,
        reports: Reports,
        log: HandOverLog | None = None,
    ) -> None:
        self.plan = plan
        self.decoders, self.inlets = decoders, inlets
        self.environment = decoders[0].environment
        self.numbers = [replica.number for replica in decoders]
        limits = decoders[0].state.limits
        self.state = RouterState(len(decoders), limits.num_blocks * limits.block_size)
        reports.watch(self.state, self.numbers)
        self._recorder, self._reports, self._log = recorder, reports, log
        self._memory = plan.init()

    def prefilled(self, request: Request, source: int) -> None:
        """A request has its first token on an instance that does not decode."""
        handed = Handed(request, request.view(1), source)
        if self._log is None:
            place = self._choose(handed, self.environment.now)
            self._announce(handed, place)
        else:
            moves = self._log.moves[request.request_id]
            self.environment.process(self._replay(handed, moves))

    def _choose(self, handed: Handed, announced_s: float) -> int:
        now, view = self.environment.now, handed.view
        place = checked_hand_over(self.plan, self._memory, view, self.state, now)
        choice = Choice.of(place, self.state, self.numbers)
        self._recorder.hand_over(
            view.request_id, now, choice, announced_s, handed.source, kv_tokens(view)
        )
        self.state.sent(view, place)
        return place

    def _announce(self, handed: Handed, place: int) -> None:
        inlet = self.inlets[place]
        self.decoders[place].notice(lambda: inlet.announce(handed))

    def _replay(self, handed: Handed, moves: MoveTimes) -> Generator[Event, Any, None]:
        """Hand over when the logged router did, knowing what that one knew."""
        environment = self.environment
        yield environment.arrival(max(moves.instant_s, environment.now))
        self._reports.known(moves.known, environment.now)
        place = self._choose(handed, moves.announced_s)
        yield environment.arrival(max(moves.announced_s, environment.now))
        self._announce(handed, place)


def simulate_hand_over(  # noqa: PLR0913  what a deployment is made of
    source: Source,
    routing: Routing,
    plan: InstancePlan,
    engines: Engines,
    transport: Callable[[ExactEnvironment], Transport],
    kv_bytes_per_token: int,
    *,
    log: HandOverLog | None = None,
) -> Trace:
    """Serve all requests of a source on instances that only prefill and others that only decode.

    Args:
        source: as of `replica.simulate`.
        routing: chooses who prefills a request.
        plan: says which instances do what, who decodes, and when KV moves.
        engines: the instances; those that decode cache no prefixes.
        transport: carries KV.
        kv_bytes_per_token: of the KV of one token, all layers.
        log: of another run, whose instants and knowledge are taken over.

    Raises:
        ValueError: a policy breaks its rules, or leaves requests unserved.
    """
    environment = ExactEnvironment()
    ends = _Ends(environment, source, plan, None if log is None else log.router.answers)
    first, second = phases(plan, len(engines.paces))
    prefillers = [ends.prefiller(engines, at) for at in first]
    mover = Mover(transport(environment), kv_bytes_per_token, ends.recorder, prefillers, log)
    inlets = [DecodeInlet(plan, mover) for _ in second]
    decoders = [ends.decoder(engines, at, inlet) for at, inlet in zip(second, inlets, strict=True)]
    ends.hand_overs = HandOvers(plan, decoders, inlets, ends.recorder, ends.reports, log)
    router_log = None if log is None else log.router
    router = Router(routing, prefillers, ends.recorder, ends.reports, router_log)
    ends.feed.start(router.submit)
    environment.run()
    if unfetched := sum(inlet.num_handed for inlet in inlets):
        raise ValueError(unfetched_text(plan, unfetched))
    replicas = sorted([*prefillers, *decoders], key=lambda replica: replica.number)
    engines.require_served(replicas)
    return merge(traces_of(replicas), *ends.recorder.tables())


class _Ends:
    """What the instances of a deployment are joined to."""

    hand_overs: HandOvers

    def __init__(
        self, environment: ExactEnvironment, source: Source, plan: InstancePlan,
        answers: Sequence[tuple[int, int]] | None,
    ) -> None:  # fmt: skip
        self.environment, self.plan = environment, plan
        self.feed, self.recorder = Feed(environment, source), RouteRecorder()
        self.reports = Reports(self.recorder, answers)

    def prefiller(self, engines: Engines, number: int) -> Replica:
        """An instance that only prefills."""

        def pass_on(request: Request, instant_s: float) -> None:
            self.reports.done(request.request_id, number, instant_s)
            self.hand_overs.prefilled(request, number)

        return engines.replica(
            self.environment, number, finished=self._finished(number), pass_on=pass_on
        )

    def decoder(self, engines: Engines, number: int, inlet: DecodeInlet) -> Replica:
        """An instance that only decodes."""
        limits = engines.limits._replace(prefix_caching=False)
        return engines.replica(
            self.environment, number, limits=limits, finished=self._finished(number), inlet=inlet
        )

    def _finished(self, number: int) -> Finished:
        def tell(request_id: int, instant_s: float) -> None:
            self.reports.done(request_id, number, instant_s)
            self.feed.answered(request_id, instant_s)

        return tell
