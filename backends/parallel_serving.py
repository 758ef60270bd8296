"""Serve a workload on several ranks in one call: the parallel form of `backends/serving.py`."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from backends.checkpoints import runnable_architecture
from backends.collectives import Sent
from backends.emulated_link import EmulatedLink
from backends.kv_cache import Corruption
from backends.parallel import Driver, Stage
from backends.pipeline import serve_lanes
from backends.ranks import require_ranks, run_ranks
from backends.sampling import Sampler
from backends.serving import RANDOM, Served, require_model, serve
from backends.shards import Share, require_shares
from backends.weights import TINY_CONFIG, load_model, random_model
from sim.engine import ReplicaLimits
from sim.lanes import lane_limits, num_lanes
from sim.models.architecture import Architecture
from sim.policies.batching.base import Batching
from sim.policies.registry import load_file, user_files
from sim.policies.routing.base import Routing
from sim.policies.routing.round_robin import RoundRobin
from sim.requests import Request
from sim.workload.base import Workload
from sim.workload.source import Source


@dataclass(frozen=True, kw_only=True)
class ParallelRun:
    """All that the ranks need to know."""

    weights: str
    """As `backends.serving.open_model` takes it."""
    config: Mapping[str, object] | None = None
    """Of random weights; None: that of the tiny model."""
    tp_size: int = 1
    pp_size: int = 1
    device: str = "cpu"
    workload: Workload
    """What is served; drawn from `seed`."""
    batching: Batching
    limits: ReplicaLimits
    seed: int = 0
    max_model_tokens: int | None = None
    """Prompt and answer of one request together; None: the model's context."""
    prompts: Sequence[list[int]] | None = None
    """Token ids by request; None draws them from the seed."""
    sampler: Sampler | None = None
    """None is greedy."""
    corruption: Corruption | None = None
    """A fault to put into the first rank's KV cache."""
    link: EmulatedLink | None = None
    """What deliveries between ranks are delayed by; None: nothing."""
    batches_in_flight: int | None = None
    """None: one a stage. Each has its share of the seats and blocks of `limits`."""
    routing: Routing = field(default_factory=RoundRobin)
    """Chooses the batch that serves a request, where several are in flight."""

    @property
    def size(self) -> int:
        """Ranks."""
        return self.tp_size * self.pp_size

    @property
    def lanes(self) -> int:
        """Batches in flight."""
        return num_lanes(self.batches_in_flight, self.pp_size)

    @property
    def lane_limits(self) -> ReplicaLimits:
        """The limits of each."""
        return lane_limits(self.limits, self.lanes)


class ParallelServed(NamedTuple):
    """What a run on several ranks gives back."""

    served: Served
    """Bytes are those of all ranks together."""
    sent: list[Sent]
    """Of all ranks, from the first request on."""
    sampler: Sampler
    """Of the rank that sampled."""
    link: str | None = None
    """What is to be said of its times: `emulated` over such a link; None: nothing."""

    def payload_bytes(self) -> Counter[str]:
        """Bytes handed in by all ranks, by what they carried."""
        total: Counter[str] = Counter()
        for one in self.sent:
            total[one.name] += one.payload_bytes
        return total


class _Returned(NamedTuple):
    """What one rank gives back."""

    served: Served | None
    """The first rank's."""
    kv_bytes: tuple[int, int, int]
    """Written, read and freed."""
    sent: list[Sent]
    sampler: Sampler | None
    """Of the rank that sampled."""


def serve_parallel(run: ParallelRun) -> ParallelServed:
    """Serve on `tp_size * pp_size` ranks of this machine, one process each.

    Raises:
        ValueError: the model or the sizes are refused, or the policy is.
        ChildProcessError: a rank was lost.
    """
    require_model(run.weights, run.device)
    require_ranks(run.size, run.device)
    require_shares(architecture_of(run), run.tp_size, run.pp_size)
    assert run.lane_limits.num_blocks > 0  # refuses shares that are none
    # Modules of a user's own policies are read again in each process before the run is.
    arguments = (user_files(), pickle.dumps(run))
    returned: list[_Returned] = run_ranks(_serve_rank, run.size, arguments, run.device)
    served = returned[0].served
    assert served is not None
    written, read, freed = (sum(one.kv_bytes[at] for one in returned) for at in range(3))
    return ParallelServed(
        Served(served.trace, served.answers, written, read, freed),
        sorted(row for one in returned for row in one.sent),
        next(one.sampler for one in returned if one.sampler is not None),
        None if run.link is None else run.link.label,
    )


def architecture_of(run: ParallelRun) -> Architecture:
    """The whole model that a run names.

    Raises:
        ValueError: a model that is not there or cannot be read.
    """
    if run.weights == RANDOM:
        return runnable_architecture(TINY_CONFIG if run.config is None else run.config, "config")
    return load_model(run.weights).config


def _serve_rank(rank: int, size: int, files: list[Path], pickled: bytes) -> _Returned:
    for path in files:
        load_file(path)
    run: ParallelRun = pickle.loads(pickled)
    assert size == run.size
    sampler = run.sampler or Sampler()
    stage = open_stage(run, rank, sampler)
    served = None
    if rank == 0:
        served = _drive(stage, run)
    else:
        stage.follow()
    counts = [(one.written_bytes, one.read_bytes, one.freed_bytes) for one in stage.caches]
    written, read, freed = (sum(column) for column in zip(*counts, strict=True))
    drawn_by = (sampler if rank == 0 else stage.sampler) if stage.samples else None
    return _Returned(served, (written, read, freed), stage.tally.sent(), drawn_by)


def open_stage(run: ParallelRun, rank: int, sampler: Sampler) -> Stage:
    """A rank's share of the model that a run names; the other ranks open theirs."""
    model = random_model(run.config) if run.weights == RANDOM else load_model(run.weights)
    share = Share(rank=rank, tp_size=run.tp_size, pp_size=run.pp_size)
    device = torch.device(run.device, rank) if run.device == "cuda" else run.device
    return Stage(model, share, sampler, device, run.link)


def _drive(stage: Stage, run: ParallelRun) -> Served:
    driver = Driver(stage)
    context = run.max_model_tokens or driver.max_context
    source = Source(run.workload, run.seed, context)

    def prompt(request: Request) -> list[int]:
        assert run.prompts is not None
        return run.prompts[request.request_id]

    prompts = None if run.prompts is None else prompt
    if run.lanes == 1:
        served = serve(
            driver, source, run.batching, run.limits, seed=run.seed, prompts=prompts,
            sampler=run.sampler, corruption=run.corruption,
        )  # fmt: skip
    else:
        served = serve_lanes(
            driver, source, run.batching, run.lane_limits, run.routing, run.lanes,
            seed=run.seed, prompts=prompts, corruption=run.corruption,
        )  # fmt: skip
    driver.stop()
    return served
