"""The global manager of elastic instances on ranks: the twin of the simulated one.

It asks the plan, gives orders to ranks, takes their tokens, and goes on with the others when one is
lost. One round at a time; groups compute concurrently.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from backends.arrivals import Arrivals
from backends.elastic_orders import (
    DecodeOrder,
    DropOrder,
    MiniBatch,
    MoveOrder,
    PrefillOrder,
    Report,
)
from backends.elastic_processes import Desk
from hardware_models.scaling import ScalingBase
from sim.elastic_log import ElasticLog
from sim.elastic_trace import NEVER
from sim.engine import ReplicaLimits
from sim.policies.elastic import ElasticPlan
from sim.requests import Request
from sim.state.elastic_kv import Ints, Left, shares
from sim.state.elastic_state import ElasticState, Group, Moved, Prefilling
from sim.steps import DecodeGroup, Migration, Step
from sim.workload.source import Source

PATIENCE_S = 1.0
"""How long nothing is looked at while nothing happens."""


class ObservedState(ElasticState):
    """The bookkeeping, whose free slots are those that the ranks' own pools report."""

    def __init__(
        self, limits: ReplicaLimits, num_instances: int, scaling: ScalingBase, observed: Ints
    ) -> None:
        super().__init__(limits, num_instances, scaling)
        self._observed = observed
        self._at_begin = observed.copy()
        """Of the round under way."""

    @property
    def free_slots(self) -> Ints:
        """See `ElasticView`. A member of a round shows what it had when the round began.

        One that is done with it has reported the slots of its new tokens, others have not.
        """
        decoding = list(self.decoding)
        if not decoding:
            return self._observed
        free = self._observed.copy()
        free[decoding] = self._at_begin[decoding]
        return free

    def begin_round(self, groups: Sequence[DecodeGroup]) -> list[Group]:
        """See `ElasticState`."""
        self._at_begin = self._observed.copy()
        return super().begin_round(groups)


class _Running(NamedTuple):
    """A group that computes."""

    order: int
    members: tuple[int, ...]
    request_ids: Sequence[int]


class ElasticInstances:
    """The serving loop."""

    def __init__(
        self, desk: Desk, plan: ElasticPlan, state: ObservedState,
        prompts: Callable[[Request], list[int]],
    ) -> None:  # fmt: skip
        """Put the manager together.

        Args:
            desk: of ranks that are ready.
            plan: decides.
            state: empty.
            prompts: gives the token ids of a request's prompt.
        """
        self._desk, self._plan, self._state, self._prompts = desk, plan, state, prompts
        self._memory = plan.init()
        self.log = ElasticLog(state)
        self.answers: dict[int, list[int]] = {}
        """Of requests that are done."""
        self._tokens: dict[int, list[int]] = {}
        """Prompt and answer so far of the others."""
        self._prompt_tokens: dict[int, int] = {}
        self._homes: dict[int, set[int]] = {}
        """Where a request may have KV."""
        self._prefills: dict[int, _Running] = {}
        self._round: list[_Running] = []
        self._in_flight: list[Moved] = []
        """What migrated in a step that a loss broke off: nothing else of it began."""
        self._again = False
        """Whether the plan is asked again at once: its last step began nothing."""
        self._start = self._seen_s = 0.0
        """The clock's reading at t = 0, and the instant until which arrivals were taken in."""

    def serve(self, source: Source, start: float) -> None:
        """Serve all requests of a source at their arrival times.

        Args:
            source: of requests.
            start: the clock's reading at t = 0.

        Raises:
            ValueError: the plan breaks its rules, or leaves requests unserved.
            RuntimeError: all instances are lost, or one has failed.
        """
        self._start = start
        arrivals, came = Arrivals(source), False
        while True:
            came |= self._arrive(arrivals)
            lost: list[int] = []
            while self._desk.deaths:
                lost.append(self._bury(self._desk.deaths.popleft()))
            ended = self._settle(arrivals)
            if lost or ended or self._again or (came and not self._state.in_round):
                came |= self._arrive(arrivals)
                self._ask(lost)
                came = False
            elif not self._is_busy and arrivals.next_s is None:
                self._require_served()
                return
            else:
                self._desk.hear(self._patience_s(arrivals))

    # What happens of itself --------------------------------------------------------------------

    def _arrive(self, arrivals: Arrivals) -> bool:
        self._seen_s = self._now_s()
        came = list(arrivals.until(self._seen_s))
        for request in came:
            self.log.arrived(request)
            self._state.submit(request)
            self._tokens[request.request_id] = list(self._prompts(request))
            self._prompt_tokens[request.request_id] = request.prompt_tokens
        return bool(came)

    def _settle(self, arrivals: Arrivals) -> bool:
        """Take what has ended; whether anything has."""
        ended = False
        for lane, one in list(self._prefills.items()):
            if self._desk.is_done(one.order) and not self._desk.deaths:
                del self._prefills[lane]
                self._take_tokens(one, self._desk.take(one.order))
                _, done = self._state.end_prefill(lane)
                now_s = self._now_s()
                self.log.prefill_ended(lane, now_s)
                self._finish(done, now_s, arrivals)
                ended = True
        orders = [one.order for one in self._round]
        if orders and all(map(self._desk.is_done, orders)) and not self._desk.deaths:
            for one in self._round:
                self._take_tokens(one, self._desk.take(one.order))
            self._round = []
            self._state.pass_rounds(1)
            done = self._state.end_round()
            now_s = self._now_s()
            self.log.rounds_ended([now_s])
            self._finish(done, now_s, arrivals)
            ended = True
        return ended

    def _take_tokens(self, running: _Running, reports: Iterable[Report]) -> None:
        came = {one: token for report in reports for one, token in report.tokens.items()}
        if missing := set(running.request_ids) - set(came):
            raise RuntimeError(
                f"instances {running.members} computed no token for requests {sorted(missing)}: "
                "logits are not numbers; check the weights"
            )
        for request_id, token in came.items():
            self._tokens[request_id].append(token)

    def _finish(self, done: Sequence[Left], now_s: float, arrivals: Arrivals) -> None:
        self.log.finished(done, now_s)
        for one in done:
            request_id = one.request.request_id
            answer = self._tokens.pop(request_id)
            self.answers[request_id] = answer[self._prompt_tokens.pop(request_id) :]
            arrivals.answered(request_id, now_s)
        self._drop(one.request.request_id for one in done)

    def _bury(self, instance: int) -> int:
        """Go on without an instance: what it had part in is thrown away when its peers are done."""
        state = self._state
        if len(state.live) == 1:
            raise RuntimeError(
                f"instance {instance}, the last of {state.num_instances}, is lost; the run ends "
                "here, start it again"
            )
        hit = [one for one in (*self._prefills.values(), *self._round) if instance in one.members]
        self._desk.await_done(*(one.order for one in hit))
        self._prefills = {lane: one for lane, one in self._prefills.items() if one not in hit}
        self._round = [one for one in self._round if one not in hit]
        left, now_s = state.lose(instance, self._in_flight), self._now_s()
        self.log.lost(instance, left, now_s)
        self._drop(one.request.request_id for one in left)
        return instance

    # What a step is made of --------------------------------------------------------------------

    def _ask(self, lost: Sequence[int]) -> None:
        """Let the plan decide, and begin what it says.

        Args:
            lost: instances whose loss it has not been asked about.

        Raises:
            ValueError: it breaks its rules.
        """
        self._again, self._in_flight = False, []
        now_s = self._seen_s  # what arrives from then on, the plan does not see
        for one in lost[:-1]:  # noted together: the plan is asked once
            self.log.asked(now_s, Step(), one)
        step = self._plan.step(self._memory, self._state)
        self.log.asked(now_s, step, lost[-1] if lost else -1)
        try:
            self._apply(step, now_s)
        except ValueError as error:
            name = type(self._plan).__name__
            raise ValueError(f"policy {name} at {now_s} s: {error}; mend the policy") from error

    def _apply(self, step: Step, now_s: float) -> None:
        self.log.preempted(self._state.preempt(step.preempt), now_s)
        self._drop(step.preempt)
        if step.migrate and not self._migrate(step.migrate):
            return  # a loss is to be taken note of first
        for place, plan in enumerate(step.prefill):
            used = [at for group in step.decode for at in group.instances]
            begun = self._state.begin_prefill(plan, used)
            self.log.prefill_begun(begun, place, self._now_s())
            self._begin_prefill(begun)
        if step.decode:
            self._begin_round(step.decode)
        moved = step.preempt or step.migrate
        self._again = bool(moved and not step.prefill and not step.decode)

    def _migrate(self, plans: Sequence[Migration]) -> bool:
        """Move KV, one pair of instances after another; whether nobody was lost meanwhile."""
        moved: list[tuple[Moved, float, float]] = []
        arrived = True
        for plan in plans:
            parts, begin_s = self._state.migrate(plan), self._now_s()
            moves = tuple((one.request_id, one.tokens) for one in parts)
            pair = plan.source, plan.target
            order = self._desk.give(
                pair,
                lambda number, pair=pair, moves=moves: MoveOrder(number, *pair, moves),
            )  # fmt: skip
            reports = self._desk.await_done(order)
            arrived &= len(reports) == len(pair) and not any(one.lost for one in reports)
            moved += [(one, begin_s, self._now_s()) for one in parts]
            for one in parts:
                self._homes[one.request_id].add(plan.target)
        self._in_flight = [] if arrived else [one for one, _, _ in moved]
        for one, begin_s, end_s in moved:
            self.log.moved(one, begin_s, end_s if arrived else NEVER)
        return arrived

    def _begin_prefill(self, begun: Prefilling) -> None:
        plan, tokens = begun.plan, self._tokens
        kept = shares(begun.lengths, plan.targets)
        for request_id, placed in zip(plan.request_ids, kept, strict=True):
            self._homes[request_id] = {at for at, _ in placed}
        order = self._desk.give(
            plan.instances,
            lambda number: PrefillOrder(
                number, plan.request_ids, tuple(list(tokens[one]) for one in plan.request_ids),
                plan.instances, tuple(map(tuple, kept)),
            ),
        )  # fmt: skip
        self._prefills[plan.instances[0]] = _Running(order, plan.instances, plan.request_ids)
        self._desk.await_begun(order)

    def _begin_round(self, plans: Sequence[DecodeGroup]) -> None:
        groups = self._state.begin_round(plans)
        self.log.round_begun(groups, self._now_s())
        for group in groups:
            parts = tuple(self._mini_batches(group))

            def order_of(number: int, parts: tuple[MiniBatch, ...] = parts) -> DecodeOrder:
                return DecodeOrder(number, parts)

            order = self._desk.give(group.instances, order_of)
            ids: list[int] = group.request_ids.tolist()
            self._round.append(_Running(order, group.instances, ids))

    def _mini_batches(self, group: Group) -> Iterable[MiniBatch]:
        ids, first = group.request_ids.tolist(), 0
        for master, count in group.masters:
            rows, mine = group.rows[first : first + count], tuple(ids[first : first + count])
            first += count
            held = self._state.kv.tokens[rows] > 0
            holders = tuple(
                (at, tuple(held[:, at].nonzero()[0].tolist()))
                for at in group.instances
                if at != master and held[:, at].any()
            )
            for one in mine:
                self._homes[one].add(master)
            last = tuple(self._tokens[one][-1] for one in mine)
            places = tuple(len(self._tokens[one]) - 1 for one in mine)
            yield MiniBatch(master, mine, last, places, holders)

    def _drop(self, request_ids: Iterable[int]) -> None:
        """Free what requests have anywhere; returns when the pools have said so."""
        by_home: dict[int, list[int]] = {}
        for request_id in request_ids:
            for home in self._homes.pop(request_id, ()):
                by_home.setdefault(home, []).append(request_id)
        orders = [
            self._desk.give((home,), lambda number, ids=tuple(ids): DropOrder(number, ids))
            for home, ids in by_home.items()
        ]
        self._desk.await_done(*orders)

    # Inside ------------------------------------------------------------------------------------

    @property
    def _is_busy(self) -> bool:
        return bool(self._prefills or self._round or self._desk.deaths)

    def _now_s(self) -> float:
        return time.perf_counter() - self._start

    def _patience_s(self, arrivals: Arrivals) -> float:
        if arrivals.next_s is None:
            return PATIENCE_S
        return min(max(arrivals.next_s - self._now_s(), 0.0), PATIENCE_S)

    def _require_served(self) -> None:
        if unserved := self._state.num_unfinished:
            raise ValueError(
                f"policy {type(self._plan).__name__} left {unserved} requests unserved and waits "
                "for arrivals that never come; mend the policy"
            )
