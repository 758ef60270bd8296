"""Elastic instances under simulated time: groups that prefill, rounds of decoding, KV that moves.

LoongServe (arXiv 2404.09526, sections 4 and 5). Rounds in which nothing can change are one event.
"""

from bisect import bisect_left
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any, NamedTuple

from simpy.events import Event

from hardware_models.scaling import ScalingBase
from sim.costs.elastic import DecodeWork
from sim.elastic_log import ElasticLog
from sim.elastic_trace import NEVER, ElasticTables
from sim.engine import ReplicaLimits
from sim.policies.elastic import ElasticPlan
from sim.processes.elastic_pace import ElasticPace
from sim.processes.exact_time import ExactEnvironment
from sim.processes.feed import Feed
from sim.processes.kv_moves import Transport
from sim.requests import Request
from sim.state.elastic_kv import Left
from sim.state.elastic_state import ElasticState, Group, Moved
from sim.steps import Standing, Step
from sim.trace import Trace
from sim.workload.source import Source

NOBODY = -1
"""Where no instance was lost."""


class Deployment(NamedTuple):
    """What elastic instances are made of."""

    plan: ElasticPlan
    limits: ReplicaLimits
    """Of every instance: `num_blocks` slots of one token; seats and tokens of all together."""
    num_instances: int
    scaling: ScalingBase
    """What the plan knows about time."""
    kv_bytes_per_token: int


class ElasticInstances:
    """The main loop: something ends or comes, the plan is asked, groups begin."""

    def __init__(
        self, environment: ExactEnvironment, made_of: Deployment, pace: ElasticPace,
        transport: Transport, *, one_by_one: bool = False,
        finished: Callable[[int, float], None] | None = None,
    ) -> None:  # fmt: skip
        self.environment, self.pace = environment, pace
        self.plan, self._memory = made_of.plan, made_of.plan.init()
        self.state = ElasticState(made_of.limits, made_of.num_instances, made_of.scaling)
        self.log = ElasticLog(self.state)
        self._transport, self._token_bytes = transport, made_of.kv_bytes_per_token
        self._one_by_one, self._finished = one_by_one, finished
        self._asking = False
        """Whether the plan will be asked at this instant."""
        self._moving = False
        """Whether KV migrates: nothing else begins, and what ends is noted when it has."""
        self._held: list[Callable[[], None]] = []
        """What ended meanwhile."""
        self._gone = False
        """Whether an instance was lost meanwhile."""
        self._in_flight: list[Moved] = []
        """KV that migrates, or did in a step of which nothing else began."""
        self._lost: list[int] = []
        """Instances whose loss the plan has not been asked about."""
        self._timer: Event | None = None
        """The end of the rounds under way."""
        self._boundaries: list[float] = []
        """Of these rounds, their start first."""
        self._settled = 0
        """Rounds of them that `state` already counts."""
        self._arrivals_after = 0
        """Rounds of them before an arrival may end them."""

    # What comes from outside -------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Take a request at its arrival."""
        self.log.arrived(request)
        self.state.submit(request)
        if not self.state.in_round:
            self._ask_soon()
        else:
            self._cut(self._arrivals_after)

    def lost(self, instance: int, event: Event) -> None:
        """See `lose`: called by an event."""
        del event
        self.lose(instance)

    def lose(self, instance: int) -> None:
        """An instance is gone, before any boundary of this instant.

        While KV migrates this is noted when that has ended, and nothing else of the step begins.
        """
        if self._moving:
            self._gone = True
            self._held.append(partial(self.lose, instance))
            return
        self._settle()
        now = self.environment.now
        left = self.state.lose(instance, self._in_flight)
        self.log.lost(instance, left, now)
        self._lost.append(instance)
        if not self.state.in_round:
            self._timer, self._boundaries = None, []
        self._cut(1)
        self._ask_soon()

    # Asking ------------------------------------------------------------------------------------

    def _ask_soon(self) -> None:
        """Ask once at this instant, when all that ends or comes at it is known."""
        if self._moving:
            self._held.append(self._ask_soon)
        elif not self._asking and not self.pace.asks_itself:
            self._asking = True
            self.environment.decision(self.environment.now).callbacks = [self._ask_now]

    def _ask_now(self, event: Event) -> None:
        del event
        self._asking = False
        self.ask()

    def ask(self) -> None:
        """Ask the plan now and do what it says."""
        if self._moving:
            self._held.append(self.ask)
            return
        self._settle()
        state, now = self.state, self.environment.now
        *others, last = self._lost or [NOBODY]
        self._lost, self._in_flight = [], []
        for one in others:  # noted together: the plan is asked once
            self.log.asked(now, Step(), one)
        step = self.plan.step(self._memory, state)
        self.log.asked(now, step, last)
        try:
            self.log.preempted(state.preempt(step.preempt), now)
            moved = [one for each in step.migrate for one in state.migrate(each)]
            if moved:
                self._moving = True
                self.environment.process(self._migrate(step, moved))
            else:
                self._begin(step)
        except ValueError as error:
            name = type(self.plan).__name__
            raise ValueError(f"policy {name} at {now} s: {error}; mend the policy") from error

    def _migrate(self, step: Step, moved: Sequence[Moved]) -> Generator[Event, Any, None]:
        """Let KV flow, all of it at once; then the rest of the step begins."""
        begin_s, self._in_flight = self.environment.now, list(moved)
        flows = [
            (one, self._transport.send(one.source, one.target, one.tokens * self._token_bytes))
            for one in moved
        ]
        ends_s: list[float] = []
        for _, arrived in flows:
            yield arrived
            ends_s.append(self.environment.now)
        self._moving = False
        gone, self._gone = self._gone or self.pace.moves_fail, False
        for one, end_s in zip(moved, ends_s, strict=True):
            self.log.moved(one, begin_s, NEVER if gone else end_s)
        if not gone:  # else the step may want who is lost: the plan is asked again
            self._in_flight = []
            self._begin(step)
        held, self._held = self._held, []
        for note in held:
            note()

    def _begin(self, step: Step) -> None:
        state, now = self.state, self.environment.now
        decoding = {at for group in step.decode for at in group.instances}
        for at, plan in enumerate(step.prefill):
            begun = state.begin_prefill(plan, decoding)
            self.log.prefill_begun(begun, at, now)
            end_s = self.pace.prefill_end_s(now, len(plan.instances), begun.lengths, at)
            if end_s is not None:
                ended = partial(self._prefilled, plan.instances[0], begun)
                self.environment.boundary(end_s).callbacks = [ended]
        if step.decode:
            groups = state.begin_round(step.decode)
            self._begin_rounds(groups)
        if (step.preempt or step.migrate) and not (step.prefill or step.decode):
            self._ask_soon()

    # Prefills ----------------------------------------------------------------------------------

    def _prefilled(self, lane: int, begun: object, event: Event | None = None) -> None:
        """A prefill has ended, unless its group was lost."""
        del event
        if self.state.prefill_of(lane) is not begun:
            return
        if self._moving:
            self._held.append(partial(self._prefilled, lane, begun))
            return
        now = self.environment.now
        _, done = self.state.end_prefill(lane)
        self.log.prefill_ended(lane, now)
        self._tell(done)
        self._cut(1)
        self._ask_soon()

    def _tell(self, done: Sequence[Left]) -> None:
        self.log.finished(done, self.environment.now)
        if self._finished is not None:
            for one in done:
                self._finished(one.request.request_id, self.environment.now)

    # Rounds ------------------------------------------------------------------------------------

    def _begin_rounds(self, groups: Sequence[Group]) -> None:
        """Begin as many rounds of the same groups as may pass before the plan is asked."""
        state, now = self.state, self.environment.now
        standing = Standing() if self._one_by_one else self.plan.steady(self._memory, state)
        count = min(standing.rounds, state.rounds_to_finish(), state.rounds_in_memory())
        if count < 1:
            raise ValueError(f"{standing} is no round")
        self._arrivals_after = standing.arrivals_after
        works = [self._work(group) for group in groups]
        self.log.round_begun(groups, now)
        self._boundaries, self._settled = self.pace.rounds(now, works, count), 0
        self._timer = self.environment.boundary(self._boundaries[-1])
        self._timer.callbacks = [partial(self._round_over, self._boundaries)]

    def _work(self, group: Group) -> DecodeWork:
        mini = dict(group.masters)
        held = self.state.kv.tokens[group.rows].sum(0)
        return DecodeWork(
            tuple([count for _, count in group.masters]),
            tuple([int(held[at]) for at in group.instances]),
            tuple([mini.get(at, 0) for at in group.instances]),
        )

    def _cut(self, after: int) -> None:
        """Let the rounds under way end at the next boundary, but not before so many of them."""
        if self._timer is None:
            return
        boundaries = self._boundaries
        count = max(bisect_left(boundaries, self.environment.now, 1), after)
        if count < len(boundaries) - 1:
            self.environment.advance(self._timer, boundaries[count])
            del boundaries[count + 1 :]

    def _settle(self) -> None:
        """Let `state` count the rounds that have ended before now."""
        if self._timer is not None:
            passed = bisect_left(self._boundaries, self.environment.now) - 1
            if passed > self._settled:
                self.state.pass_rounds(passed - self._settled)
                self.log.rounds_ended(self._boundaries[self._settled + 1 : passed + 1], over=False)
                self._settled = passed

    def _round_over(self, boundaries: list[float], event: Event | None = None) -> None:
        """The rounds under way have ended, unless they were lost."""
        del event
        if self._boundaries is not boundaries:
            return
        if self._moving:
            self._held.append(partial(self._round_over, boundaries))
            return
        self.state.pass_rounds(len(boundaries) - 1 - self._settled)
        self._timer, self._boundaries = None, []
        self.log.rounds_ended(boundaries[self._settled + 1 :])
        done = self.state.end_round()
        self._tell(done)
        self._ask_soon()


class ElasticRun(NamedTuple):
    """What a run of elastic instances gives back."""

    trace: Trace
    tables: ElasticTables


def simulate_elastic(
    source: Source,
    made_of: Deployment,
    pace: ElasticPace,
    transport: Callable[[ExactEnvironment], Transport],
    *,
    losses: Sequence[tuple[float, int]] = (),
    one_by_one: bool = False,
) -> ElasticRun:
    """Serve all requests of a source on instances that form new groups for every iteration.

    Args:
        source: as of `alone.simulate`.
        made_of: plan, limits and instances.
        pace: how long prefills and rounds last, or another run's log of that.
        transport: carries KV that migrates.
        losses: (instant, instance) at which instances are lost for good.
        one_by_one: ask the plan after every round, also where its answer stands.

    Raises:
        ValueError: the plan breaks its rules, or leaves requests unserved.
    """
    environment = ExactEnvironment()
    feed = Feed(environment, source)
    instances = ElasticInstances(
        environment, made_of, pace, transport(environment), one_by_one=one_by_one,
        finished=feed.answered,
    )  # fmt: skip
    for instant_s, instance in losses:
        environment.arrival(instant_s).callbacks = [partial(instances.lost, instance)]
    pace.start(environment, instances)
    feed.start(instances.submit)
    environment.run()
    if unserved := instances.state.num_unfinished:
        raise ValueError(
            f"policy {type(made_of.plan).__name__} left {unserved} requests unserved and waits "
            "for events that never come; mend the policy"
        )
    return ElasticRun(instances.log.trace(), instances.log.tables())
