"""A deployment of elastic instances in a few lines."""

from dataclasses import dataclass, field

import numpy as np

from hardware_models.scaling import DecodeScaling, PrefillScaling, ScalingBase
from sim.engine import ReplicaLimits
from sim.requests import RequestView
from sim.steps import DecodeBatch, DecodeGroup, Migration, Prefill, Step

MEASURED_4 = PrefillScaling(base_s=37.4e-3, token_s=0.00998e-3, square_s=1.934e-10)
"""Fitted to measurements of four instances of two GPUs."""


def paper_base(degrees: int = 4) -> ScalingBase:
    """LWM-7B on instances of two A800, as interpolated from one to four instances and beyond."""
    found = [
        PrefillScaling(
            base_s=(17 + 7 * (d - 1)) * 1e-3,
            token_s=0.030e-3 / d * (1 + 0.11 * (d - 1)),
            square_s=7.8e-10 / d,
        )
        for d in range(1, degrees + 1)
    ]
    if degrees >= 4:
        found[3] = MEASURED_4
    decode = DecodeScaling(
        base_s=9.8e-3, request_s=0.0, master_request_s=0.015e-3, context_token_s=4.76e-8
    )
    return ScalingBase(
        name="paper", model="lwm_7b", device="a800", tp_size=2, prefill=found, decode=decode,
        source="interpolated",
    )  # fmt: skip


@dataclass(eq=False)
class Job:
    """A request, and what only the deployment knows of it."""

    request: RequestView
    output_tokens: int
    generated: int
    kv: np.ndarray
    """[instances]"""

    @property
    def view(self) -> RequestView:
        return self.request._replace(generated_tokens=self.generated)


@dataclass
class Deployment:
    """Elastic instances without a clock: an `ElasticView` that keeps a plan to the contract."""

    limits: ReplicaLimits
    scaling: ScalingBase
    size: int
    live: list[int] = field(init=False)
    queue: list[Job] = field(default_factory=list)
    running: list[tuple[Prefill, list[Job]]] = field(default_factory=list)
    jobs: dict[int, list[Job]] = field(default_factory=dict)
    """Of each batch."""
    groups: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Members of each batch's last group."""
    round: list[DecodeGroup] = field(default_factory=list)
    rounds: int = 0
    answers: list[int] = field(default_factory=list)
    """Lengths of those that are finished."""
    served: list[int] = field(default_factory=list)
    num_batches: int = 0

    def __post_init__(self) -> None:
        self.live = list(range(self.size))

    @property
    def in_round(self) -> bool:
        return bool(self.round)

    @property
    def decoding(self) -> frozenset[int]:
        return frozenset(at for group in self.round for at in group.instances)

    @property
    def prefilling(self) -> frozenset[int]:
        return frozenset(at for one, _ in self.running for at in one.instances)

    @property
    def waiting(self) -> list[RequestView]:
        return [job.view for job in self.queue]

    @property
    def num_running(self) -> int:
        held = [*self.jobs.values(), *(jobs for _, jobs in self.running)]
        return sum(len(jobs) for jobs in held)

    @property
    def finished(self) -> tuple[int, int]:
        return len(self.answers), sum(self.answers)

    @property
    def free_slots(self) -> np.ndarray:
        free = np.full(self.size, self.limits.num_blocks)
        for jobs in [*self.jobs.values(), *(jobs for _, jobs in self.running)]:
            for job in jobs:
                free -= job.kv
        assert (free >= 0).all(), "more KV than slots"
        free[[at for at in range(self.size) if at not in self.live]] = 0
        return free

    @property
    def batches(self) -> list[DecodeBatch]:
        return [self._batch(number) for number in sorted(self.jobs)]

    def _batch(self, number: int) -> DecodeBatch:
        jobs = self.jobs[number]
        return DecodeBatch(
            number,
            self.groups[number],
            np.array([job.request.request_id for job in jobs]),
            np.array([job.generated for job in jobs]),
            np.array([job.request.max_output_tokens - job.generated for job in jobs]),
            np.array([job.kv.sum() for job in jobs]),
            np.sum([job.kv for job in jobs], axis=0),
        )

    def given_up(self, request_id: int) -> np.ndarray:
        found = [job for jobs in self.jobs.values() for job in jobs]
        return next(job for job in found if job.request.request_id == request_id).kv.copy()

    def arrive(self, request: RequestView, output_tokens: int) -> None:
        nothing = np.zeros(self.size, np.int64)
        self.queue.append(Job(request, output_tokens, request.generated_tokens, nothing))

    def add_batch(self, jobs: list[Job], instances: tuple[int, ...]) -> None:
        self.jobs[self.num_batches], self.groups[self.num_batches] = jobs, instances
        self.num_batches += 1

    def apply(self, step: Step) -> None:
        """Begin what a step says, if it may."""
        self._preempt(step.preempt)
        for move in step.migrate:
            self._migrate(move)
        taken = list(self.prefilling | self.decoding)
        for prefill in step.prefill:
            taken += prefill.instances
        for group in step.decode:
            taken += group.instances
        assert len(taken) == len(set(taken)), "an instance is in two groups"
        assert set(taken) <= set(self.live), "an instance is lost"
        if self.in_round:
            assert step == Step(prefill=step.prefill), "a round is under way"
        for prefill in step.prefill:
            self._begin_prefill(prefill)
        for group in step.decode:
            self._begin_decode(group)
        assert self.num_running <= self.limits.max_num_seqs

    def _preempt(self, ids: tuple[int, ...]) -> None:
        lost: list[Job] = []
        for number, jobs in list(self.jobs.items()):
            lost += [job for job in jobs if job.request.request_id in ids]
            self._keep(number, [job for job in jobs if job.request.request_id not in ids])
        assert len(lost) == len(set(ids)) == len(ids), "a pre-empted request has no KV"
        lost.sort(key=lambda job: ids.index(job.request.request_id))
        for job in lost:
            job.kv[:] = 0
        self.queue[:0] = lost

    def _keep(self, number: int, jobs: list[Job]) -> None:
        if jobs:
            self.jobs[number] = jobs
        else:
            del self.jobs[number], self.groups[number]

    def _migrate(self, move: Migration) -> None:
        assert not {move.source, move.target} & self.prefilling
        assert move.tokens <= self.free_slots[move.target]
        left = move.tokens
        for job in self.jobs[move.batch]:
            part = min(left, job.kv[move.source])
            job.kv[move.source] -= part
            job.kv[move.target] += part
            left -= part
        assert left == 0, "more moves than the source has"

    def _begin_prefill(self, prefill: Prefill) -> None:
        by_id = {job.request.request_id: job for job in self.queue}
        jobs = [by_id[one] for one in prefill.request_ids]
        self.queue = [job for job in self.queue if job not in jobs]
        assert 1 <= len(prefill.instances) <= self.scaling.max_degree
        assert {at for at, _ in prefill.targets} <= set(prefill.instances)
        whole = [job.view.prefill_tokens for job in jobs]
        assert sum(tokens for _, tokens in prefill.targets) == sum(whole)
        places = [at for at, tokens in prefill.targets for _ in range(tokens)]
        for job, tokens in zip(jobs, whole, strict=True):
            np.add.at(job.kv, places[:tokens], 1)
            del places[:tokens]
        self.running.append((prefill, jobs))
        _ = self.free_slots

    def _begin_decode(self, group: DecodeGroup) -> None:
        jobs = [job for number in group.batches for job in self.jobs.pop(number)]
        for number in group.batches:
            del self.groups[number]
        self.jobs[group.batches[0]] = jobs
        holders = np.flatnonzero(np.sum([job.kv for job in jobs], axis=0))
        assert set(holders.tolist()) <= set(group.instances), "KV outside of the group"
        assert {at for at, _ in group.masters} <= set(group.instances)
        assert len({at for at, _ in group.masters}) == len(group.masters)
        assert sum(count for _, count in group.masters) == len(jobs)
        free = self.free_slots
        assert all(1 <= count <= free[at] for at, count in group.masters), "a master has no room"
        self.groups[group.batches[0]] = group.instances
        self.round.append(group)

    def end_prefill(self, place: int) -> None:
        prefill, jobs = self.running.pop(place)
        for job in jobs:
            self._token(job)
        if jobs := [job for job in jobs if job.generated < job.output_tokens]:
            self.add_batch(jobs, tuple(at for at, _ in prefill.targets))

    def _token(self, job: Job) -> None:
        job.generated += 1
        if job.generated == job.output_tokens:
            self.answers.append(job.generated)
            self.served.append(job.request.request_id)

    def end_round(self) -> int:
        """The requests that finish."""
        before = len(self.served)
        for group in self.round:
            jobs = self.jobs[group.batches[0]]
            masters = [at for at, count in group.masters for _ in range(count)]
            for job, at in zip(jobs, masters, strict=True):
                job.kv[at] += 1
                self._token(job)
            self._keep(group.batches[0], [one for one in jobs if one.generated < one.output_tokens])
        self.round, self.rounds = [], self.rounds + 1
        return len(self.served) - before

    def lose(self, at: int) -> None:
        """Between rounds. Whose KV is there, or who is prefilled there, begins anew."""
        self.live.remove(at)
        lost = [job for one, jobs in self.running if at in one.instances for job in jobs]
        self.running = [(one, jobs) for one, jobs in self.running if at not in one.instances]
        for number, jobs in list(self.jobs.items()):
            lost += [job for job in jobs if job.kv[at]]
            self._keep(number, [job for job in jobs if not job.kv[at]])
        for job in lost:
            job.kv[:] = 0
        self.queue[:0] = sorted(lost, key=lambda job: job.request.request_id)
