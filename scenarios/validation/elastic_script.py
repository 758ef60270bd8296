"""Plans of elastic instances that follow a script: every kind of group, whatever it is worth."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sim.policies.elastic import ElasticPlan, ElasticView
from sim.steps import DecodeGroup, Migration, Prefill, Step

MOST_BATCHES = 3
"""Then a round makes one of them."""
MIGRATE_EVERY, PREEMPT_EVERY = 3, 7
"""Rounds."""


@dataclass
class Turns:
    """What was done so far."""

    prefills: int = 0
    rounds: int = 0
    migrated: int = -1
    """The round before which KV migrated last, and below, before which somebody was pre-empted."""
    preempted: int = -1


class EveryWay(ElasticPlan):
    """Cycles through degrees, who keeps the KV, masters, migrations and pre-emptions."""

    def init(self) -> Turns:
        """See `ElasticPlan`."""
        return Turns()

    def step(self, memory: Turns, view: ElasticView) -> Step:
        """See `ElasticPlan`."""
        if view.in_round or view.prefilling:
            return Step()
        if view.waiting and len(view.batches) < MOST_BATCHES:
            memory.prefills += 1
            return Step(prefill=(self._prefill(memory.prefills - 1, view),))
        if not view.batches:
            return Step()
        now = memory.rounds
        if now % PREEMPT_EVERY == PREEMPT_EVERY - 1 and memory.preempted < now:
            memory.preempted = now
            return Step(preempt=(int(view.batches[-1].request_ids[-1]),))
        moves: tuple[Migration, ...] = ()
        if now % MIGRATE_EVERY == MIGRATE_EVERY - 1 and memory.migrated < now:
            memory.migrated = now
            moves = (self._migration(now, view),)
        memory.rounds += 1
        return Step(migrate=moves, decode=(self._round(now, view),))

    def _prefill(self, turn: int, view: ElasticView) -> Prefill:
        """One or two requests; every degree with every way of keeping the KV in turn."""
        live = list(view.live)
        chosen = list(view.waiting)[: 1 + turn % 2]
        degree, way = 1 + turn % len(live), turn // len(live) % 4
        ring = tuple(live[(turn // 2 + at) % len(live)] for at in range(degree))
        tokens = sum(one.prefill_tokens for one in chosen)
        kept = {
            0: [(ring[0], tokens)],
            1: [(ring[-1], tokens)],
            2: [(at, len(part)) for at, part in
                zip(ring, np.array_split(np.arange(tokens), degree), strict=True)],
            3: [(ring[-1], tokens // 3), (ring[0], tokens - tokens // 3)],
        }[way]  # fmt: skip
        return Prefill(tuple(one.request_id for one in chosen), ring, tuple(kept))

    def _migration(self, turn: int, view: ElasticView) -> Migration:
        """Half of what the fullest member of a batch has goes to another instance."""
        batch = view.batches[turn % len(view.batches)]
        source = int(batch.tokens.argmax())
        others = [at for at in view.live if at != source]
        tokens = max(1, int(batch.tokens[source]) // 2)
        return Migration(batch.number, source, others[turn % len(others)], tokens)

    def _round(self, turn: int, view: ElasticView) -> DecodeGroup:
        """All batches on all instances, with other masters each time."""
        live = list(view.live)
        count = sum(one.num_requests for one in view.batches)
        names = [live[(turn + at) % len(live)] for at in range(1 + turn % len(live))]
        return DecodeGroup(
            tuple(one.number for one in view.batches), tuple(live), dealt(count, names)
        )


class Job(NamedTuple):
    """A batch that is computed while nothing else is."""

    requests: int
    degree: int
    spread: bool
    """Whether every member keeps what it computes as much of; else the first keeps all."""
    masters: int = 1
    """Of its rounds, the first instances."""
    rounds: int = 0
    """Of decoding after the prefill: as many as its answers have more tokens than one."""


class OneAfterAnother(ElasticPlan):
    """Jobs in order, to be timed."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        """Take the jobs over; their requests come in order."""
        self._jobs = list(jobs)

    def init(self) -> list[int]:
        """See `ElasticPlan`: the number of the job under way."""
        return [-1]

    def step(self, memory: list[int], view: ElasticView) -> Step:
        """See `ElasticPlan`."""
        if view.in_round or view.prefilling:
            return Step()
        if view.batches:
            (batch,) = view.batches
            masters = dealt(batch.num_requests, list(range(self._jobs[memory[0]].masters)))
            members = dict.fromkeys((*batch.instances, *(at for at, _ in masters)))
            return Step(decode=(DecodeGroup((batch.number,), tuple(sorted(members)), masters),))
        if not view.waiting:
            return Step()
        memory[0] += 1
        job = self._jobs[memory[0]]
        chosen = list(view.waiting)[: job.requests]
        ring = tuple(range(job.degree))
        tokens = sum(one.prefill_tokens for one in chosen)
        kept = [(ring[0], tokens)]
        if job.spread:
            parts = np.array_split(np.arange(tokens), job.degree)
            kept = [(at, len(part)) for at, part in zip(ring, parts, strict=True)]
        return Step(prefill=(Prefill(tuple(one.request_id for one in chosen), ring, tuple(kept)),))


RINGS = ((0, 1), (2, 3))
"""Of `TwoRings`: the first keeps KV everywhere, the second on one instance."""


class TwoRings(ElasticPlan):
    """The first half of the requests on one ring, the other half on another, one by one."""

    def __init__(self, half: int) -> None:
        """Take over how many requests each ring prefills; answers of one token."""
        self._half = half

    def init(self) -> None:
        """See `ElasticPlan`: nothing to remember."""

    def step(self, memory: None, view: ElasticView) -> Step:
        """See `ElasticPlan`."""
        del memory
        if view.prefilling or not view.waiting:
            return Step()
        request = view.waiting[0]
        down = request.request_id >= self._half
        ring, tokens = RINGS[down], request.prefill_tokens
        half = tokens // 2
        kept = ((ring[0], tokens),) if down else ((ring[0], half), (ring[1], tokens - half))
        return Step(prefill=(Prefill((request.request_id,), ring, kept),))


def dealt(count: int, names: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Mini-batches of requests for masters, as even as they can be, none of them empty."""
    parts = np.array_split(np.arange(count), len(names))
    return tuple((at, len(part)) for at, part in zip(names, parts, strict=True) if len(part))
