"""What an executor of elastic instances writes down: the trace and the tables of both panels.

Lane i of the trace has the prefills of groups whose first instance is i; the lane after the last
instance has the rounds of decoding, and all requests and events. What a loss cuts short stays in
the trace as an iteration that ends then and brings no tokens to those who were lost.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sim.costs.base import decode_shape
from sim.elastic_trace import DECODE, PREFILL, ElasticRecorder, ElasticTables, digest_of
from sim.models.work import IterationShape
from sim.policies.batching.base import Batch
from sim.recorder import Recorder
from sim.requests import Request
from sim.state.elastic_kv import Left
from sim.state.elastic_state import ElasticState, Group, Moved, Prefilling
from sim.steps import Step
from sim.trace import ANSWERS, HAND_OVERS, ROUTES, State, Trace, empty
from sim.trace_merge import merge


class _OpenPrefill(NamedTuple):
    """A prefill under way, by its lane."""

    begun: Prefilling
    members: list[int]
    """Rows of the members table."""
    start_s: float


class _OpenRound:
    """The round that was begun last, or the rounds that one decision stands for."""

    def __init__(self, step: int, start_s: float) -> None:
        self.step, self.start_s = step, start_s
        self.under_way = True
        self.passed = 0
        """Rounds of it that have ended."""
        self.members: dict[int, int] = {}
        """Row of the members table by instance, of those that have not ended."""


class ElasticLog:
    """Told of everything in the order in which an executor does it to its `ElasticState`."""

    def __init__(self, state: ElasticState) -> None:
        """Begin with nothing written.

        Args:
            state: of the executor; read, never changed.
        """
        self._state = state
        self._prefill_lanes = [Recorder(at) for at in range(state.num_instances)]
        self._rounds = Recorder(state.num_instances)
        self._tables = ElasticRecorder()
        self._before = (0, 0, 0, 0)
        """What the last decision had seen, as `Recorder.decision` takes it."""
        self._prefills: dict[int, _OpenPrefill] = {}
        self._round: _OpenRound | None = None
        self._decoding: list[int] = []
        """Requests of the last round that was begun."""
        self._stays: dict[int, int] = {}
        """Of requests that decode, the first round of their stay."""
        self._preempted: list[int] = []
        """Since the last round was begun."""

    def arrived(self, request: Request) -> None:
        """A request has come, and is submitted."""
        self._rounds.arrived(request)

    def asked(self, instant_s: float, step: Step, lost: int = -1) -> None:
        """A plan has answered; nothing of its step is applied yet.

        Args:
            instant_s: when.
            step: the answer.
            lost: the instance whose loss was the reason; -1: none was.
        """
        state = self._state
        free, waiting = int(state.free_slots.sum()), len(state.waiting)
        stored = len(state.live) * state.limits.num_blocks - free
        self._before = free, waiting, stored, 0
        seen = waiting, state.num_running, free, state.in_round
        counts = len(step.migrate), len(step.prefill), len(step.decode)
        self._tables.asked(instant_s, seen, lost, counts)

    def preempted(self, left: Sequence[Left], instant_s: float) -> None:
        """Requests have lost their KV at a decision and wait again."""
        self._preempted += [one.request.request_id for one in left]
        self._leave(left, instant_s, State.preempted)

    def moved(self, one: Moved, begin_s: float, end_s: float) -> None:
        """KV has migrated."""
        self._tables.moved(
            one.request_id, (one.source, one.target), one.tokens, (begin_s, end_s)
        )  # fmt: skip

    def prefill_begun(self, begun: Prefilling, place: int, instant_s: float) -> None:
        """A group begins to prefill.

        Args:
            begun: what `ElasticState.begin_prefill` returned.
            place: of the prefill in its step.
            instant_s: when.
        """
        plan, lengths = begun.plan, begun.lengths
        lane = plan.instances[0]
        for request_id in plan.request_ids:
            self._rounds.event(request_id, instant_s, State.admitted)
        batch = Batch(
            admit=plan.request_ids,
            prefill=tuple(zip(plan.request_ids, lengths, strict=True)),
        )
        shape = IterationShape.of([(tokens, 0) for tokens in lengths], (), len(lengths))
        self._prefill_lanes[lane].decision(instant_s, 1, self._before, shape, batch, (), ())
        digest, requests = digest_of(plan.request_ids), len(plan.request_ids)
        members: list[int] = []
        for at in plan.instances:
            kept = sum(tokens for target, tokens in plan.targets if target == at)
            row = PREFILL, place, at, requests, kept, digest, instant_s
            members.append(self._tables.member(*row))
        self._prefills[lane] = _OpenPrefill(begun, members, instant_s)

    def prefill_ended(self, lane: int, instant_s: float) -> None:
        """All requests of a prefill have their next token; `finished` tells of those that end."""
        one = self._prefills.pop(lane)
        recorder = self._prefill_lanes[lane]
        recorder.passed((one.start_s, instant_s))
        self._tables.ended(one.members, instant_s)
        for request_id in one.begun.plan.request_ids:
            recorder.run(request_id, recorder.num_iterations - 1, 0)
            self._rounds.event(request_id, instant_s, State.decoding)

    def round_begun(self, groups: Sequence[Group], instant_s: float) -> None:
        """A round begins, or several of the same groups.

        Args:
            groups: what `ElasticState.begin_round` returned; nothing of them has passed.
            instant_s: when.
        """
        one = self._round = _OpenRound(self._tables.step, instant_s)
        ids: list[int] = []
        context = 0
        for place, group in enumerate(groups):
            members = group.request_ids.tolist()
            ids += members
            context += int(self._state.kv.context[group.rows].sum())
            held = self._state.kv.tokens[group.rows].sum(0)
            masters, digest = dict(group.masters), digest_of(members)
            for at in group.instances:
                row = DECODE, place, at, masters.get(at, 0), int(held[at]), digest, instant_s
                one.members[at] = self._tables.member(*row)
        joined, left = self._change(ids)
        shape = decode_shape(len(ids), context + len(ids))
        batch = Batch(preempt=tuple(self._preempted), decode=True)
        self._preempted = []
        self._rounds.decision(instant_s, 1, self._before, shape, batch, joined, left)

    def _change(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """Open and close stays for a round of these requests; who joins and leaves it."""
        before, now = set(self._decoding), set(ids)
        joined = [one for one in ids if one not in before]
        left = [one for one in self._decoding if one not in now]
        self._decoding = ids
        for request_id in left:
            self._close(request_id)
        for request_id in ids:
            self._stays.setdefault(request_id, self._rounds.num_iterations)
        return joined, left

    def rounds_ended(self, ends_s: Sequence[float], *, over: bool = True) -> None:
        """Rounds of the groups that were begun last have ended; `finished` tells of who ends.

        May be called several times for one `round_begun`.

        Args:
            ends_s: of each round, in order.
            over: whether these were the last of them.
        """
        one = self._round
        assert one is not None
        one.passed += len(ends_s)
        one.under_way = not over
        self._rounds.passed((one.start_s, *ends_s))
        self._rounds.repeat(one.passed)
        self._tables.rounds(one.step, one.passed)
        if ends_s:
            self._tables.ended(list(one.members.values()), ends_s[-1])

    def finished(self, left: Sequence[Left], instant_s: float) -> None:
        """Requests have their last token."""
        self._leave(left, instant_s, State.finished)

    def lost(self, instance: int, left: Sequence[Left], instant_s: float) -> None:
        """An instance is gone; all rounds that have ended by then were told of.

        Args:
            instance: which.
            left: what `ElasticState.lose` returned.
            instant_s: when.
        """
        self._leave(left, instant_s, State.lost)
        for lane, prefill in list(self._prefills.items()):
            if instance in prefill.begun.plan.instances:
                del self._prefills[lane]
                self._prefill_lanes[lane].passed((prefill.start_s, instant_s))
                self._tables.ended(prefill.members, instant_s, lost=True)
        one = self._round
        if one is None or not one.under_way:
            return
        decoding = self._state.decoding
        gone = [at for at in one.members if at not in decoding]
        self._tables.ended([one.members.pop(at) for at in gone], instant_s, lost=True)
        if not self._state.in_round:  # all of its groups are lost
            one.under_way = False
            self._rounds.passed((one.start_s, instant_s))
            self._rounds.repeat(one.passed + 1)

    def trace(self) -> Trace:
        """The trace; `sim.metrics` and `sim.summary` take it."""
        lanes = [*self._prefill_lanes, self._rounds]
        tables = empty(ROUTES), empty(ANSWERS), empty(HAND_OVERS)
        return merge([one.trace() for one in lanes], *tables)

    def tables(self) -> ElasticTables:
        """Steps, members of groups, and KV that migrated."""
        return self._tables.tables()

    def _leave(self, left: Iterable[Left], instant_s: float, state: State) -> None:
        for one in left:
            request_id = one.request.request_id
            self._close(request_id)
            self._rounds.event(request_id, instant_s, state)

    def _close(self, request_id: int) -> None:
        """Note a stay that is over; one whose first round was lost has brought no token."""
        first = self._stays.pop(request_id, None)
        if first is not None and (rounds := self._rounds.num_iterations - first):
            self._rounds.run(request_id, first, rounds - 1)
