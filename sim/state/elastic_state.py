"""The bookkeeping of elastic instances: an `ElasticView` for plans, verbs for both panels.

It refuses a step that breaks the rules of `sim/policies/elastic.py`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hardware_models.scaling import ScalingBase
from sim.engine import ReplicaLimits
from sim.requests import Request, RequestView
from sim.state.elastic_kv import Ints, KvMap, Left, WaitingLine, shares
from sim.steps import FOREVER, DecodeBatch, DecodeGroup, Migration, Prefill


@dataclass(slots=True)
class Group:
    """A batch that decodes or is paused."""

    number: int
    rows: Ints
    request_ids: Ints
    instances: tuple[int, ...]
    masters: tuple[tuple[int, int], ...] = ()
    """Of the round under way: (instance, requests); empty: it is not in it."""


class Prefilling(NamedTuple):
    """A batch that is prefilled now."""

    plan: Prefill
    rows: list[int]
    lengths: list[int]
    """Tokens of each request, in the order of the batch."""


class Moved(NamedTuple):
    """KV of one request that goes from one instance to another."""

    request_id: int
    source: int
    target: int
    tokens: int


class ElasticState:
    """Who waits, prefills, decodes or is paused, and where their KV is."""

    def __init__(self, limits: ReplicaLimits, num_instances: int, scaling: ScalingBase) -> None:
        self.limits, self.scaling = limits, scaling
        self.num_instances = num_instances
        self.kv = KvMap(num_instances, limits.num_blocks)
        self.line = WaitingLine()
        self.rounds = 0
        self.in_round = False
        self.finished = (0, 0)
        self.live: list[int] = list(range(num_instances))
        self._groups: dict[int, Group] = {}
        self._prefills: dict[int, Prefilling] = {}
        """By the first instance of each group: its lane."""
        self._numbers = 0
        self._shown: list[DecodeBatch] | None = None

    # What plans see ----------------------------------------------------------------------------

    @property
    def free_slots(self) -> Ints:
        """[instances] tokens for whose KV there is room."""
        return self.kv.free

    @property
    def waiting(self) -> Sequence[RequestView]:
        """Requests without KV, pre-empted ones first, then in order of arrival."""
        return self.line.views

    def given_up(self, request_id: int) -> Ints:
        """[instances] slots that come free when this request of a batch is pre-empted."""
        return self.kv.tokens[self.kv.rows[request_id]].copy()

    @property
    def num_running(self) -> int:
        """Requests that prefill or have KV."""
        return len(self.kv.rows)

    @property
    def num_unfinished(self) -> int:
        """Requests that wait, prefill or have KV."""
        return len(self.kv.requests)

    def prefill_of(self, lane: int) -> Prefilling | None:
        """The prefill under way whose group has this first instance."""
        return self._prefills.get(lane)

    @property
    def prefilling(self) -> frozenset[int]:
        """Instances whose group computes a prefill now."""
        return frozenset(at for one in self._prefills.values() for at in one.plan.instances)

    @property
    def decoding(self) -> frozenset[int]:
        """Instances in groups of the round under way."""
        if not self.in_round:
            return frozenset()
        groups = self._groups.values()
        return frozenset(at for one in groups if one.masters for at in one.instances)

    @property
    def batches(self) -> Sequence[DecodeBatch]:
        """All batches that decode or are paused, by number."""
        if self._shown is None:
            self._shown = [self._show(one) for _, one in sorted(self._groups.items())]
        return self._shown

    def _show(self, one: Group) -> DecodeBatch:
        kv, rows = self.kv, one.rows
        generated = kv.generated[rows]
        return DecodeBatch(
            one.number, one.instances, one.request_ids, generated, kv.limit[rows] - generated,
            kv.context[rows], kv.tokens[rows].sum(0),
        )  # fmt: skip

    # What executors do -------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queue a request that has arrived."""
        self.kv.requests[request.request_id] = request
        self.line.views.append(request.view())

    def preempt(self, request_ids: Sequence[int]) -> list[Left]:
        """Drop the KV of requests that decode or are paused, and queue them first."""
        groups = {one: group for group in self._groups.values() for one in group.request_ids}
        for request_id in request_ids:
            group = groups.get(request_id)
            if group is None or (self.in_round and group.masters):
                raise ValueError(f"request {request_id} is pre-empted and is in no batch at rest")
        return self._drop(request_ids)

    def _drop(self, request_ids: Iterable[int]) -> list[Left]:
        """Requests of batches lose their KV and wait again."""
        ids = list(request_ids)
        left = [self.kv.leave(request_id, ended=False) for request_id in ids]
        self.line.back(left)
        self._leave_groups(ids)
        return left

    def migrate(self, plan: Migration) -> list[Moved]:
        """Move KV of a batch at rest from one instance to another."""
        group, kv = self._at_rest(plan.batch), self.kv
        held = int(kv.tokens[group.rows, plan.source].sum())
        room = int(kv.free[plan.target])
        if not 0 < plan.tokens <= held or plan.tokens > room or plan.target not in self.live:
            raise ValueError(
                f"{plan}: the source has {held} tokens of the batch, the target room for {room}"
            )
        busy = self.prefilling | self.decoding
        if plan.source in busy or plan.target in busy:
            raise ValueError(f"{plan} moves KV of instances that compute")
        moved = kv.move(group.rows, plan.source, plan.target, plan.tokens)
        members = [*group.instances, plan.target]
        group.instances = self._holders(group.rows, members)
        self._shown = None
        ids = dict(zip(group.rows.tolist(), group.request_ids.tolist(), strict=True))
        return [Moved(ids[row], plan.source, plan.target, tokens) for row, tokens in moved]

    def begin_prefill(self, plan: Prefill, used: Iterable[int] = ()) -> Prefilling:
        """Take requests out of the queue and give them slots at their targets.

        Args:
            plan: of the step.
            used: instances in groups of the same step's round.
        """
        busy = self.prefilling | self.decoding | frozenset(used)
        members = set(plan.instances)
        if not members or len(members) < len(plan.instances) or members & busy:
            raise ValueError(f"{plan}: its instances repeat, or compute already")
        if not members <= set(self.live):
            raise ValueError(f"{plan} has instances that are lost")
        if not plan.request_ids:
            raise ValueError(f"{plan} has no request")
        views = self.line.take(plan.request_ids)
        lengths = [view.prefill_tokens for view in views]
        if sum(tokens for _, tokens in plan.targets) != sum(lengths):
            raise ValueError(f"{plan}: its targets do not add up to {sum(lengths)} tokens")
        if not {instance for instance, _ in plan.targets} <= members:
            raise ValueError(f"{plan} keeps KV outside of its group")
        rows = [
            self.kv.seat(view, placed)
            for view, placed in zip(views, shares(lengths, plan.targets), strict=True)
        ]
        if self.kv.free.min() < 0 or self.num_running > self.limits.max_num_seqs:
            raise ValueError(f"{plan} takes more slots or seats than there are")
        begun = Prefilling(plan, rows, lengths)
        self._prefills[plan.instances[0]] = begun
        return begun

    def end_prefill(self, lane: int) -> tuple[list[int], list[Left]]:
        """A prefill is over: its requests have a token more and become a batch.

        Returns:
            Requests that go on, and those whose first token was their last.
        """
        begun = self._prefills.pop(lane)
        rows = np.array(begun.rows, np.int64)
        self.kv.generated[rows] += 1
        ids = np.array(begun.plan.request_ids, np.int64)
        going = self.kv.generated[rows] < self.kv.output[rows]
        done = [self._end(request_id) for request_id in ids[~going].tolist()]
        if going.any():
            self._add(rows[going], ids[going], begun.plan.instances)
        return ids[going].tolist(), done

    def begin_round(self, groups: Sequence[DecodeGroup]) -> list[Group]:
        """Begin a round; returns its groups in the order of the step."""
        if self.in_round:
            raise ValueError(f"{list(groups)} begin while a round is under way")
        busy = set(self.prefilling)
        begun: list[Group] = []
        for plan in groups:
            members = set(plan.instances)
            if members & busy or len(members) < len(plan.instances):
                raise ValueError(f"{plan}: its instances repeat, or compute already")
            if not members <= set(self.live):
                raise ValueError(f"{plan} has instances that are lost")
            busy |= members
            begun.append(self._enter(plan))
        self.in_round, self._shown = True, None
        return begun

    def _enter(self, plan: DecodeGroup) -> Group:
        group = self._join([self._at_rest(number) for number in plan.batches], plan)
        if not set(self._holders(group.rows, range(self.num_instances))) <= set(plan.instances):
            raise ValueError(f"{plan} leaves out instances that hold KV of its batch")
        counts = [count for _, count in plan.masters]
        names = [instance for instance, _ in plan.masters]
        if sum(counts) != len(group.rows) or min(counts, default=0) < 1:
            raise ValueError(f"{plan}: its masters must share out {len(group.rows)} requests")
        if len(set(names)) < len(names) or not set(names) <= set(plan.instances):
            raise ValueError(f"{plan}: its masters repeat, or are not in the group")
        for instance, count in plan.masters:
            if self.kv.free[instance] < count:
                raise ValueError(
                    f"{plan}: instance {instance} has {self.kv.free[instance]} free slots for "
                    f"{count} requests"
                )
        group.instances, group.masters = tuple(plan.instances), tuple(plan.masters)
        return group

    def _join(self, parts: list[Group], plan: DecodeGroup) -> Group:
        if not parts or any(one.masters for one in parts):
            raise ValueError(f"{plan} has no batch, or one that is in the round already")
        first = parts[0]
        for other in parts[1:]:
            del self._groups[other.number]
            first.rows = np.concatenate((first.rows, other.rows))
            first.request_ids = np.concatenate((first.request_ids, other.request_ids))
        return first

    def rounds_to_finish(self) -> int:
        """Rounds until the first request of the round under way has its last token."""
        kv, found = self.kv, FOREVER
        for one in self._groups.values():
            if one.masters:
                found = min(found, int((kv.output[one.rows] - kv.generated[one.rows]).min()))
        return found

    def rounds_in_memory(self) -> int:
        """Rounds for which the masters of the round under way have room."""
        masters = [master for one in self._groups.values() for master in one.masters]
        return min(int(self.kv.free[at]) // count for at, count in masters)

    def pass_rounds(self, count: int) -> None:
        """So many rounds of the same groups have ended; nobody finishes before the last one."""
        for one in self._groups.values():
            start = 0
            for instance, requests in one.masters:
                self.kv.store(one.rows[start : start + requests], instance, count)
                start += requests
        self.rounds += count
        self._shown = None

    def end_round(self) -> list[Left]:
        """The round is over, its tokens are counted: who has the last one leaves."""
        self.in_round, self._shown = False, None
        done: list[Left] = []
        kv = self.kv
        for one in list(self._groups.values()):
            if not one.masters:
                continue
            one.masters = ()
            ended = kv.generated[one.rows] >= kv.output[one.rows]
            if ended.any():
                ids = one.request_ids[ended].tolist()
                self._leave_groups(ids)
                done += [self._end(request_id) for request_id in ids]
            if one.number in self._groups:
                one.instances = self._holders(one.rows, one.instances)
        return done

    def lose(self, instance: int, in_flight: Sequence[Moved] = ()) -> list[Left]:
        """An instance is gone: who was computed or had KV there waits again.

        A group of the round under way is lost whole; the others go on.

        Args:
            instance: which.
            in_flight: KV that was migrating when it went. What came from it or went to it is lost.

        Returns:
            The requests that lost their KV, in the order in which they now wait.
        """
        self.live.remove(instance)
        ids: list[int] = []
        for lane, one in list(self._prefills.items()):
            if instance in one.plan.instances:
                ids += one.plan.request_ids
                del self._prefills[lane]
        for one in list(self._groups.values()):
            if self.in_round and one.masters and instance in one.instances:
                ids += one.request_ids.tolist()
                one.masters = ()
            else:
                held = self.kv.tokens[one.rows, instance] > 0
                ids += one.request_ids[held].tolist()
        gone = {one.request_id for one in in_flight if instance in (one.source, one.target)}
        ids += sorted(gone.intersection(self.kv.rows).difference(ids))
        left = self._drop(ids)
        self.kv.lose(instance)
        if self.in_round and not any(one.masters for one in self._groups.values()):
            self.in_round = False
        return left

    # Inside ------------------------------------------------------------------------------------

    def _at_rest(self, number: int) -> Group:
        group = self._groups.get(number)
        if group is None or (self.in_round and group.masters):
            raise ValueError(f"batch {number} is not at rest")
        return group

    def _add(self, rows: Ints, ids: Ints, members: Iterable[int]) -> None:
        number, self._numbers = self._numbers, self._numbers + 1
        self._groups[number] = Group(number, rows, ids, self._holders(rows, members))
        self._shown = None

    def _holders(self, rows: Ints, members: Iterable[int]) -> tuple[int, ...]:
        held = self.kv.tokens[rows].sum(0)
        return tuple(at for at in dict.fromkeys(members) if held[at])

    def _leave_groups(self, request_ids: Sequence[int]) -> None:
        gone = set(request_ids)
        for number, one in list(self._groups.items()):
            stays = np.array([each not in gone for each in one.request_ids.tolist()], np.bool_)
            if not stays.all():
                one.rows, one.request_ids = one.rows[stays], one.request_ids[stays]
                if not len(one.rows):
                    del self._groups[number]
        self._shown = None

    def _end(self, request_id: int) -> Left:
        left = self.kv.leave(request_id, ended=True)
        count, tokens = self.finished
        self.finished = count + 1, tokens + left.generated_tokens
        return left
