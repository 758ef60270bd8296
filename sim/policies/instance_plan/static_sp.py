"""Static sequence parallelism: all instances are one group, whatever comes.

The baseline of LoongServe (arXiv 2404.09526, section 7.3, "w/o ESP"). Continuous batching in which
a prefill interrupts decoding. The KV of a prefill is spread over all instances; new KV goes to one
master. With one instance that has the tensor parallelism of a node it is plain tensor parallelism.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from sim.policies.elastic import ElasticPlan, ElasticView
from sim.policies.instance_plan._elastic_cluster import Cluster, look
from sim.policies.instance_plan._elastic_dispatch import (
    ever_fits,
    future_need,
    left_after_prefill,
)
from sim.policies.instance_plan._elastic_preemption import without_latest
from sim.policies.instance_plan._elastic_scaling import DecodePlan
from sim.requests import RequestView
from sim.steps import FOREVER, DecodeGroup, Prefill, Standing, Step


@dataclass
class Memory:
    """Of one run."""

    attempt: int = -FOREVER
    """Rounds that had ended at the last attempt to admit."""
    master: int = -1
    since: int = -FOREVER
    """Rounds that had ended when the master was chosen."""
    standing: Standing = field(default_factory=Standing)


@dataclass(kw_only=True)
class StaticSp(ElasticPlan):
    """One group, first come, first served."""

    attempt_every: int = 10
    """Rounds of decoding from one prefill to the next."""
    master_rounds: int = 10
    """Rounds for which the instance with most free slots stays master of all requests; the released
    code chooses it anew every round: 1."""

    def __post_init__(self) -> None:
        for name in ("attempt_every", "master_rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def init(self) -> Memory:
        """A fresh memory."""
        return Memory()

    def step(self, memory: Memory, view: ElasticView) -> Step:
        """See `ElasticPlan`."""
        if view.in_round or view.prefilling:
            return Step()
        now = look(view)
        due = not now.held or view.rounds - memory.attempt >= self.attempt_every
        if view.waiting and due:
            memory.attempt = view.rounds
            if admitted := _admitted(view, now):
                return Step(prefill=(_prefill(now, admitted),))
        preempt, decode = (), self._decode(memory, view, now)
        if decode.short:
            preempt, decode = without_latest(
                view, now, lambda fewer: self._decode(memory, view, fewer)
            )
        if decode.groups:
            self._stand(memory, view, decode, bool(view.waiting or preempt))
        return Step(preempt, decode=tuple(decode.groups))

    def steady(self, memory: Memory, view: ElasticView) -> Standing:
        """Until the master changes, and while requests wait until the next attempt to admit."""
        del view
        return memory.standing

    def _stand(
        self, memory: Memory, view: ElasticView, decode: DecodePlan, someone_waits: bool
    ) -> None:
        first = decode.groups[0].masters[0][0]
        if not self._keeps(memory, view) or memory.master != first:
            memory.master, memory.since = first, view.rounds
        due = max(1, memory.attempt + self.attempt_every - view.rounds)
        rounds = min(decode.rounds, memory.since + self.master_rounds - view.rounds)
        memory.standing = Standing(min(rounds, due) if someone_waits else rounds, due)

    def _keeps(self, memory: Memory, view: ElasticView) -> bool:
        return view.rounds - memory.since < self.master_rounds

    def _decode(self, memory: Memory, view: ElasticView, now: Cluster) -> DecodePlan:
        """All batches as one; a master without room for all leaves the rest to the next."""
        gangs = now.gangs()
        need = sum([gang.num_requests for gang in gangs])
        if not need:
            return DecodePlan([], [], FOREVER)
        if now.room(now.open) < need:
            return DecodePlan([], gangs, FOREVER)
        places = sorted(now.open, key=lambda at: (-now.free[at], at))
        kept = memory.master
        if self._keeps(memory, view) and kept in places and now.free[kept] >= need:
            places = [kept]
        masters: list[tuple[int, int]] = []
        for at in places:
            if need:
                masters.append((at, min(need, now.free[at])))
                need -= masters[-1][1]
        batches = tuple(sorted(number for gang in gangs for number in gang.batches))
        rounds = min([now.free[at] // size for at, size in masters])
        return DecodePlan([DecodeGroup(batches, tuple(now.open), tuple(masters))], [], rounds)


def _admitted(view: ElasticView, now: Cluster) -> list[RequestView]:
    """The first of the queue that fit until their ends; one that never could holds up nobody."""
    found: list[RequestView] = []
    limits, need, tokens = view.limits, future_need(view, ()), 0
    free = now.room(now.open)
    for request in islice(view.waiting, limits.max_num_seqs):
        own, left = request.prefill_tokens, left_after_prefill(request, view)
        if not ever_fits(request, view):
            continue
        tokens += own
        whole = tokens <= limits.max_num_batched_tokens or not found
        seats = view.num_running + len(found) < limits.max_num_seqs
        if not (whole and seats and tokens <= free and need.fits(own, left)):
            break
        need.add(own, left)
        found.append(request)
    return found


def _prefill(now: Cluster, requests: Sequence[RequestView]) -> Prefill:
    """On all instances, each of which keeps as much as another, as far as it has room."""
    left = sum([request.prefill_tokens for request in requests])
    targets: list[tuple[int, int]] = []
    fullest_first = sorted(now.open, key=lambda at: (now.free[at], at))
    for place, at in enumerate(fullest_first):
        tokens = min(now.free[at], -(-left // (len(fullest_first) - place)))
        if tokens:
            targets.append((at, tokens))
            left -= tokens
    ids = tuple([request.request_id for request in requests])
    return Prefill(ids, tuple(now.open), tuple(sorted(targets)))
