"""Elastic sequence parallelism: groups of instances are formed anew for every iteration.

LoongServe (arXiv 2404.09526), section 5: dispatch, allocation, batching and scaling at every
decision, in that order; each step is a file beside this one. Where paper and released code differ
this follows the code: dispatch estimates waiting from the answers so far, gain and cost of stopping
a batch are as there, KV fills the fullest member first. Unlike there, nothing waits for the
longest prefill of a set (the code's macro iteration): whatever is free is planned for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from sim.policies.elastic import ElasticPlan, ElasticView
from sim.policies.instance_plan._elastic_allocation import allocate
from sim.policies.instance_plan._elastic_batching import Objective, Search, partition
from sim.policies.instance_plan._elastic_cluster import (
    Cluster,
    Load,
    look,
    look_beside,
)
from sim.policies.instance_plan._elastic_dispatch import (
    Chosen,
    Rules,
    Scan,
    future_need,
    left_after_prefill,
)
from sim.policies.instance_plan._elastic_preemption import without_latest
from sim.policies.instance_plan._elastic_scaling import (
    DecodePlan,
    ScaleRules,
    fill_in_order,
    plan_decode,
)
from sim.requests import RequestView
from sim.steps import FOREVER, Ints, Migration, Prefill, Standing, Step

NOTHING = Step()


@dataclass
class Memory:
    """Of one run."""

    attempt: int = -FOREVER
    """Rounds that had ended at the last attempt to admit."""
    out_of_order: int = 0
    """Admissions in a row that passed over a request."""
    prefills: dict[tuple[int, ...], tuple[Ints, Ints]] = field(
        default_factory=dict[tuple[int, ...], tuple[Ints, Ints]]
    )
    """Prefills under way by their instances: tokens and what may come, of each request."""
    standing: Standing = field(default_factory=Standing)
    """Of the last round."""


class Placed(NamedTuple):
    """A prefill as it could begin, and what then decodes."""

    now: Cluster
    prefills: list[Prefill]
    migrations: list[Migration]
    decode: DecodePlan


@dataclass(kw_only=True)
class ElasticSp(ElasticPlan):
    """Defaults are those of the paper's runs on one node, of its mixed dataset."""

    attempt_every: int = 10
    """Rounds of decoding from one attempt to admit to the next."""
    compute_bound_requests: int = 128
    """Requests of a mini-batch above which a batch wants another master."""
    decode_round_s: float = 0.022
    """What a round takes, for estimates of waiting."""
    max_prefill_s: float = 5.0
    """A prefill of several requests is not longer: beyond, a batch gains nothing."""
    max_out_of_order: int = 4
    """Admissions in a row that may pass over an earlier request. The paper's runs: 1 to 64."""
    max_scanned: int = 256
    """Requests of the queue that one attempt looks at; the released code looks at all."""
    batching: Search = Search.exact
    """How batches of a prefill are found; monotone: with the paper's bounds, which may miss."""
    objective: Objective = Objective.normalised
    """What batches make least: normalised input latency as the released code, or summed input
    latency as the paper."""
    scale_up: bool = True
    """Whether a batch may get instances that hold nothing of it."""
    scale_down_decode: bool = True
    """Whether KV of batches is packed to free instances for a prefill."""
    migration_s_per_token: float = 512 * 2**10 / (400 * 2**30 * 2)
    """For the gain of packing. The paper's model and node: 512 KiB of KV over 400 GiB/s of each of
    two GPUs of an instance; another model or slower links take another number."""
    prior_output_tokens: float = 512.0
    """The mean length of answers starts from one answer of this length."""

    def __post_init__(self) -> None:
        for name in ("attempt_every", "compute_bound_requests", "max_scanned"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("decode_round_s", "max_prefill_s", "migration_s_per_token"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not 0 < self.prior_output_tokens < float("inf"):
            raise ValueError(
                f"prior_output_tokens={self.prior_output_tokens} must be positive and finite; try "
                "512"
            )
        if self.max_out_of_order < 0:
            raise ValueError(
                f"max_out_of_order={self.max_out_of_order} must not be negative; 0 keeps the "
                "order of arrival"
            )

    def init(self) -> Memory:
        """A fresh memory."""
        return Memory()

    def step(self, memory: Memory, view: ElasticView) -> Step:
        """See `ElasticPlan`."""
        for group in [one for one in memory.prefills if view.prefilling.isdisjoint(one)]:
            del memory.prefills[group]
        if view.in_round:
            return self._beside(memory, view) if view.waiting else NOTHING
        now, num_waiting = look(view), len(view.waiting)
        placed = None
        if num_waiting and self._is_due(memory, view, now):
            memory.attempt = view.rounds
            placed = self._admitted(memory, view, now)
        if placed is None:
            placed = Placed(now, [], [], self._decode(now, ()))
        preempt: tuple[int, ...] = ()
        if placed.decode.short and not placed.prefills and not view.prefilling:
            preempt, decode = without_latest(view, now, lambda fewer: self._decode(fewer, ()))
            placed = placed._replace(decode=decode)
        left = num_waiting - sum([len(one.request_ids) for one in placed.prefills])
        self._stand(memory, view, placed.decode, left + len(preempt))
        return Step(
            preempt, tuple(placed.migrations), tuple(placed.prefills), tuple(placed.decode.groups)
        )

    def steady(self, memory: Memory, view: ElasticView) -> Standing:
        """Until a master is full, and while requests wait until the next attempt to admit."""
        del view
        return memory.standing

    def _is_due(self, memory: Memory, view: ElasticView, now: Cluster) -> bool:
        """Whether this is an attempt to admit: as soon as nothing could decode instead."""
        return not now.held or view.rounds - memory.attempt >= self.attempt_every

    def _stand(
        self, memory: Memory, view: ElasticView, decode: DecodePlan, num_waiting: int
    ) -> None:
        if decode.groups:
            due = max(1, memory.attempt + self.attempt_every - view.rounds)
            rounds = min(decode.rounds, due) if num_waiting else decode.rounds
            memory.standing = Standing(rounds, due)

    def _beside(self, memory: Memory, view: ElasticView) -> Step:
        """In a round: prefills on idle instances, which nobody else could use until it ends."""
        now = look_beside(view)
        placed = self._admitted(memory, view, now) if now.open else None
        return Step(prefill=tuple(placed.prefills)) if placed is not None else NOTHING

    def _decode(self, now: Cluster, taken: Sequence[int]) -> DecodePlan:
        """A round of all that has no instance among those taken by prefills."""
        gangs = now.gangs(taken)
        empty = [at for at in now.open if now.is_empty(at) and at not in taken]
        rules = ScaleRules(self.compute_bound_requests, self.scale_up)
        return plan_decode(gangs, now, empty, rules)

    def _admitted(self, memory: Memory, view: ElasticView, now: Cluster) -> Placed | None:
        """Steps 1 to 4 for what waits; None: nothing is admitted."""
        rules = Rules(
            self.decode_round_s, self.max_prefill_s, self.max_scanned, self.prior_output_tokens,
            packs=self.scale_down_decode and not view.in_round,
            may_skip=memory.out_of_order < self.max_out_of_order,
        )  # fmt: skip
        need = future_need(view, list(memory.prefills.values()))
        chosen = Scan(rules, view, now, need).run()
        placed = self._placed(view, now, chosen.requests) if chosen.requests else None
        if placed is None:
            return None
        self._remember(memory, view, chosen, placed.prefills)
        return placed

    def _remember(
        self, memory: Memory, view: ElasticView, chosen: Chosen, prefills: Sequence[Prefill]
    ) -> None:
        by_id = {request.request_id: request for request in chosen.requests}
        memory.out_of_order = 0 if chosen.in_order else memory.out_of_order + 1
        for one in prefills:
            requests = [by_id[number] for number in one.request_ids]
            memory.prefills[one.instances] = (
                np.array([request.prefill_tokens for request in requests]),
                np.array([left_after_prefill(request, view) for request in requests]),
            )

    def _placed(
        self, view: ElasticView, now: Cluster, requests: Sequence[RequestView]
    ) -> Placed | None:
        """Steps 2 to 4 for these requests, or as many of the first of them as have a place."""
        load = Load()
        for request in requests:
            load = load.plus(request.prefill_tokens)
        answered = {one.number: int(one.generated.sum()) for one in view.batches}
        packed = now.copy()
        pays = self.scale_down_decode and not view.in_round
        pool, migrations = allocate(
            packed, load, view.scaling, answered, self.migration_s_per_token if pays else None
        )
        prefills = self._prefills(view, packed, pool, requests)
        while prefills is None and len(requests) > 1:
            requests = requests[:-1]
            prefills = self._prefills(view, packed, pool, requests)
        if prefills is None:
            return None
        placed = Placed(packed, prefills, migrations, self._decode(packed, _members(prefills)))
        while placed.decode.short:
            # Batches that lack slots get empty instances of the prefill, as long as it fits.
            given = next((at for at in reversed(pool) if packed.is_empty(at)), None)
            pool = [at for at in pool if at != given]
            smaller = self._prefills(view, packed, pool, requests)
            if given is None or smaller is None:
                break
            decode = self._decode(packed, _members(smaller))
            placed = Placed(packed, smaller, migrations, decode)
        return placed

    def _prefills(
        self, view: ElasticView, now: Cluster, pool: Sequence[int], requests: Sequence[RequestView]
    ) -> list[Prefill] | None:
        """Step 3, and where the KV goes; None: the requests do not fit."""
        ordered = sorted(requests, key=lambda one: (-one.prefill_tokens, one.request_id))
        places = sorted(pool, key=lambda at: (-now.free[at], at))
        lengths = [one.prefill_tokens for one in ordered]
        free = [now.free[at] for at in places]
        found = partition(lengths, free, view.scaling, self.objective, self.batching)
        if found is None:
            return None
        prefills: list[Prefill] = []
        for part in found.parts:
            members = places[part.instance : part.instance_stop]
            batch = slice(part.request, part.request_stop)
            targets = fill_in_order(sum(lengths[batch]), members, now)
            ids = tuple([one.request_id for one in ordered[batch]])
            prefills.append(Prefill(ids, tuple(sorted(members)), targets))
        return prefills


def _members(prefills: Sequence[Prefill]) -> list[int]:
    return [at for one in prefills for at in one.instances]
