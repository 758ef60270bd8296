"""Deployments of elastic instances, small and random, and a plan that does anything it may."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from hardware_models.scaling import DecodeScaling, PrefillScaling, ScalingBase
from sim.costs.elastic import Scaled
from sim.engine import ReplicaLimits
from sim.policies.elastic import ElasticPlan, ElasticView
from sim.processes.elastic_instances import Deployment, ElasticRun, simulate_elastic
from sim.processes.elastic_pace import CostedGroups, ElasticPace
from sim.processes.exact_time import ExactEnvironment
from sim.processes.kv_moves import LinkTransport, Transport
from sim.steps import DecodeBatch, DecodeGroup, Migration, Prefill, Step
from sim.workload.recorded import Recorded
from sim.workload.source import Source

TOKEN_BYTES = 1024
COARSE = ScalingBase(
    name="coarse", model="none", device="none", source="by hand: multiples of a quarter second",
    prefill=[
        PrefillScaling(base_s=0.5, token_s=0.5 / degree, square_s=0.25 / degree)
        for degree in (1, 2, 4, 8)
    ],
    decode=DecodeScaling(
        base_s=0.25, request_s=0.0, master_request_s=0.25, context_token_s=0.25, exchange_s=0.25
    ),
)  # fmt: skip
"""Everything ends at multiples of a quarter second or so: many things end at one instant."""


@dataclass(kw_only=True)
class AnyStep(ElasticPlan):
    """Draws every choice that a plan has."""

    seed: int = 0

    def init(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    def step(self, memory: np.random.Generator, view: ElasticView) -> Step:
        free = view.free_slots.copy()
        busy = set(view.prefilling) | set(view.decoding)
        batches = [] if view.in_round else list(view.batches)
        preempt: tuple[int, ...] = ()
        if batches and (memory.random() < 0.1 or self._stuck(view, free, busy)):
            victim = batches.pop(int(memory.integers(len(batches))))
            preempt = tuple(victim.request_ids.tolist())
            free += victim.tokens
            batches = []
        migrate = self._migrations(memory, batches, free, busy) if memory.random() < 0.3 else ()
        decode = () if migrate else self._round(memory, batches, free, busy, view)
        prefill = self._prefills(memory, view, free, busy)
        if busy or migrate or prefill or decode:
            return Step(preempt, migrate, prefill, decode)
        return self._anything(view)

    def _stuck(self, view: ElasticView, free: Any, busy: set[int]) -> bool:
        return not busy and not free.any()

    def _anything(self, view: ElasticView) -> Step:
        """Let all decode together, or none: nobody waits for ever."""
        if not view.batches:
            return Step()
        left = sum(one.num_requests for one in view.batches)
        masters: list[tuple[int, int]] = []
        for at in view.live:
            if count := min(left, int(view.free_slots[at])):
                masters.append((at, count))
                left -= count
        if left:
            ids = [one for batch in view.batches for one in batch.request_ids.tolist()]
            first = view.waiting[0] if view.waiting else None
            if first is not None or len(ids) > 1:
                return self._first_alone(view, ids)
        numbers = tuple(one.number for one in view.batches)
        return Step(decode=(DecodeGroup(numbers, tuple(view.live), tuple(masters)),))

    def _first_alone(self, view: ElasticView, ids: list[int]) -> Step:
        return Step(preempt=tuple(ids[1:]) or tuple(ids))

    def _migrations(
        self, memory: Any, batches: list[DecodeBatch], free: Any, busy: set[int]
    ) -> tuple[Migration, ...]:
        for one in batches:
            sources = [at for at in np.flatnonzero(one.tokens).tolist() if at not in busy]
            targets = [at for at in np.flatnonzero(free).tolist() if at not in busy]
            for source in sources:
                for target in targets:
                    if source != target:
                        most = min(int(one.tokens[source]), int(free[target]))
                        tokens = int(memory.integers(1, most + 1))
                        free[source] += tokens
                        free[target] -= tokens
                        return (Migration(one.number, source, target, tokens),)
        return ()

    def _round(
        self, memory: Any, batches: list[DecodeBatch], free: Any, busy: set[int], view: ElasticView
    ) -> tuple[DecodeGroup, ...]:
        groups: list[DecodeGroup] = []
        for one in memory.permutation(len(batches)):
            batch = batches[one]
            members = set(np.flatnonzero(batch.tokens).tolist())
            if members & busy or (memory.random() < 0.1 and busy):
                continue
            others = [at for at in view.live if at not in busy | members]
            members |= set(memory.permutation(others)[: int(memory.integers(0, 2))].tolist())
            masters: list[tuple[int, int]] = []
            left = batch.num_requests
            for at in memory.permutation(sorted(members)).tolist():
                most = min(left, int(free[at]))
                count = most if memory.random() < 0.5 else int(memory.integers(0, most + 1))
                if count:
                    masters.append((at, count))
                    left -= count
            if left:
                continue
            order = memory.permutation(sorted(members)).tolist()
            groups.append(DecodeGroup((batch.number,), tuple(order), tuple(masters)))
            busy |= members
            for at, count in masters:
                free[at] -= count
        return tuple(groups)

    def _prefills(
        self, memory: Any, view: ElasticView, free: Any, busy: set[int]
    ) -> tuple[Prefill, ...]:
        found: list[Prefill] = []
        waiting = list(view.waiting)
        idle = [at for at in view.live if at not in busy]
        while waiting and idle and view.num_running + len(found) < view.limits.max_num_seqs:
            group = memory.permutation(idle)[: int(memory.integers(1, len(idle) + 1))].tolist()
            one = waiting.pop(0)
            if sum(free[at] for at in group) < one.prefill_tokens:
                group = idle
            if sum(free[at] for at in group) < one.prefill_tokens:
                break
            targets: list[tuple[int, int]] = []
            left = one.prefill_tokens
            for at in group:
                tokens = min(left, int(free[at]))
                if tokens:
                    targets.append((at, tokens))
                    free[at] -= tokens
                    left -= tokens
            found.append(Prefill((one.request_id,), tuple(group), tuple(targets)))
            idle = [at for at in idle if at not in group]
        return tuple(found)


@dataclass(frozen=True, kw_only=True)
class ElasticCase:
    workload: Recorded
    num_instances: int
    limits: ReplicaLimits
    losses: tuple[tuple[float, int], ...] = ()


@st.composite
def elastic_cases(draw: st.DrawFn, *, losses: bool = True) -> ElasticCase:
    """Few requests on few instances whose slots are scarce; each request fits on two of them."""
    count = draw(st.integers(1, 4))
    lengths = st.lists(
        st.tuples(st.integers(0, 12), st.integers(1, 12), st.integers(1, 8)), min_size=1, max_size=8
    )
    rows = sorted(draw(lengths))
    needed = max(prompt + output for _, prompt, output in rows)
    spare = count - 1 if losses and count > 1 else count
    slots = max(-(-needed // max(spare, 1)) + draw(st.integers(0, 12)), 2)
    gone: list[tuple[float, int]] = []
    if losses and count > 1 and draw(st.booleans()):
        most = count - 1 if draw(st.booleans()) else 1
        who = draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=most, unique=True))
        # Multiples of a quarter second: now and then two at once, or within a migration.
        gone = [(draw(st.integers(0, 60)) * 0.25, one) for one in who]
        slots = max(slots, -(-needed // (count - len(who))))
    return ElasticCase(
        workload=Recorded(
            arrival_s=[at * 0.5 for at, _, _ in rows],
            prompt_tokens=[prompt for _, prompt, _ in rows],
            output_tokens=[output for _, _, output in rows],
        ),
        num_instances=count,
        limits=ReplicaLimits(
            draw(st.integers(1, 8)), draw(st.sampled_from((8, 1 << 20))), 1, slots
        ),
        losses=tuple(sorted(gone)),
    )


def link(environment: ExactEnvironment) -> Transport:
    return LinkTransport(environment, 0.25, 4 * TOKEN_BYTES)


def run_elastic(
    case: ElasticCase, plan: ElasticPlan, *, one_by_one: bool = False,
    pace: ElasticPace | None = None, transport: Any = link, losses: Any = None,
) -> ElasticRun:  # fmt: skip
    made_of = Deployment(plan, case.limits, case.num_instances, COARSE, TOKEN_BYTES)
    most = case.limits.num_blocks * case.num_instances
    return simulate_elastic(
        Source(case.workload, 0, most), made_of, pace or CostedGroups(Scaled(COARSE)), transport,
        losses=case.losses if losses is None else losses, one_by_one=one_by_one,
    )  # fmt: skip
