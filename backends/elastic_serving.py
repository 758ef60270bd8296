"""Serve a workload on elastic instances in one call."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from backends.checkpoints import runnable_architecture
from backends.collectives import Sent
from backends.corruption import Corruption
from backends.elastic_instances import ElasticInstances, ObservedState
from backends.elastic_orders import RankLoss, Work
from backends.elastic_processes import Desk, InstanceProcesses
from backends.elastic_rank import RankSpec
from backends.heartbeat import TCPStore
from backends.ranks import SILENT_S, require_ranks
from backends.router import LEAD_S
from backends.sampling import Sampler
from backends.serving import RANDOM, require_model, without_collections
from backends.tokenizer import request_token_ids
from backends.weights import TINY_CONFIG, Model, load_model, random_model
from hardware_models.scaling import ScalingBase
from sim.elastic_trace import ElasticTables
from sim.engine import ReplicaLimits
from sim.models.architecture import Architecture
from sim.policies.elastic import ElasticPlan
from sim.requests import Request
from sim.trace import Trace
from sim.workload.base import Workload
from sim.workload.source import Source, check


@dataclass(frozen=True, kw_only=True)
class ElasticRun:
    """All that a run needs to know."""

    weights: str = RANDOM
    """As `backends.serving.open_model` takes it."""
    config: Mapping[str, object] | None = None
    """Of random weights; None: that of the tiny model."""
    num_instances: int
    """Elastic instances, a rank each."""
    plan: ElasticPlan
    limits: ReplicaLimits
    """`block_size` 1, and of every instance `num_blocks` slots; seats and tokens of all."""
    scaling: ScalingBase
    """What the plan may know about time."""
    workload: Workload
    """What is served; drawn from `seed`."""
    seed: int = 0
    device: str = "cpu"
    prompts: Sequence[list[int]] | None = None
    """Token ids by request; None draws them from the seed."""
    sampler: Sampler | None = None
    """None is greedy."""
    corruption: Corruption | None = None
    """A fault to put into the first instance's pool: skip_free or drop_copy."""
    losses: tuple[RankLoss, ...] = ()
    """Ranks that are lost in mid-work."""
    silent_s: float = SILENT_S
    """A rank that was not heard of for so long, and waits for no processor, is lost."""


class ElasticServed(NamedTuple):
    """What a run gives back."""

    trace: Trace
    tables: ElasticTables
    answers: dict[int, list[int]]
    kv_bytes: tuple[int, int, int]
    """Written, read and freed on all instances, by what each reported last."""
    sent: list[Sent]
    """By pair and name: ring, query, partial, migration and migration_positions; not of those that
    were lost."""
    samplers: list[Sampler]
    """Of every instance that lives."""
    work: list[Work]
    """What kept each rank busy, in the order of their reports."""

    def payload_bytes(self) -> Counter[str]:
        """Bytes handed in by all ranks, by what they carried."""
        total: Counter[str] = Counter()
        for one in self.sent:
            total[one.name] += one.payload_bytes
        return total


def serve_elastic(run: ElasticRun) -> ElasticServed:
    """Serve on elastic instances of this machine, one process each.

    Raises:
        ValueError: the model, the workload or the sizes are refused, or the plan breaks its rules.
        RuntimeError: all instances were lost, or one failed.
    """
    require_model(run.weights, run.device)
    require_ranks(run.num_instances, run.device)
    config = _architecture(run)
    context = min(config.sliding_window or config.max_position_embeddings,
                  config.max_position_embeddings)  # fmt: skip
    _require_sizes(run, context)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    spec = RankSpec(
        open_model=partial(_open, run.weights, run.config), size=run.num_instances,
        port=store.port, device=run.device, limits=run.limits, sampler=run.sampler,
        corruption=run.corruption, losses=run.losses,
    )  # fmt: skip
    with InstanceProcesses(spec, run.silent_s) as processes:
        processes.await_ready()
        desk = Desk(processes, run.limits.num_blocks)
        state = ObservedState(run.limits, run.num_instances, run.scaling, desk.free)
        manager = ElasticInstances(desk, run.plan, state, partial(_prompt, run, config.vocab_size))
        with without_collections():
            start = time.perf_counter() + LEAD_S
            processes.begin(start)
            manager.serve(Source(run.workload, run.seed, context), start)
        desk.end()
    farewells = [desk.farewells[at] for at in sorted(desk.farewells)]
    totals = zip(*(one[1:] for one in desk.counts.values()), strict=True)
    written, read, freed = (sum(column) for column in totals)
    return ElasticServed(
        manager.log.trace(), manager.log.tables(), manager.answers, (written, read, freed),
        sorted(row for one in farewells for row in one.sent),
        [one.sampler for one in farewells], desk.work,
    )  # fmt: skip


def _open(weights: str, config: Mapping[str, object] | None) -> Model:
    return random_model(config) if weights == RANDOM else load_model(weights)


def _architecture(run: ElasticRun) -> Architecture:
    if run.weights == RANDOM:
        return runnable_architecture(TINY_CONFIG if run.config is None else run.config, "config")
    return load_model(run.weights).config


def _prompt(run: ElasticRun, vocabulary: int, request: Request) -> list[int]:
    if run.prompts is not None:
        return run.prompts[request.request_id]
    return request_token_ids(run.seed, request, vocabulary)


def _require_sizes(run: ElasticRun, context: int) -> None:
    """Refuse pools that are none, and requests that fit in no number of them."""
    limits = run.limits
    if limits.block_size != 1 or limits.num_blocks < 1:
        raise ValueError(
            f"block_size={limits.block_size} must be 1 and num_blocks={limits.num_blocks} at least "
            "1: elastic instances have slots of one token each"
        )
    # The KV of the last token of an answer is never stored.
    check(run.workload, run.seed, min(context, run.num_instances * limits.num_blocks + 1))
