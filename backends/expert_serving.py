"""Serve a workload on attention and expert ranks in one call."""

from __future__ import annotations

import pickle
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from backends.attention_rank import AttentionRank
from backends.checkpoints import runnable_architecture
from backends.collectives import Collectives, Sent, Tally
from backends.emulated_link import EmulatedLink
from backends.expert_pipeline import ExpertPipeline, NodeRouter, NodeServed
from backends.expert_rank import ExpertRank, experts_of_node
from backends.kv_cache import Corruption
from backends.pipeline_layout import Layout
from backends.ranks import require_ranks, run_ranks
from backends.replica import Prompts
from backends.sampling import Sampler
from backends.serving import RANDOM, fresh_replica, require_model, without_collections
from backends.transformer import Transformer
from backends.weights import Model, load_model, random_model, shipped_config
from sim.dispatch_log import Dispatched
from sim.engine import ReplicaLimits
from sim.expert_rows import Span
from sim.models.architecture import Architecture
from sim.policies.batching.base import Batching
from sim.policies.expert_balance.base import (
    BalanceView,
    ExpertBalance,
    Placement,
    checked_placement,
)
from sim.policies.expert_balance.static import Static
from sim.policies.micro_batching.base import MicroBatching
from sim.policies.micro_batching.ping_pong import PingPong
from sim.policies.registry import load_file, user_files
from sim.policies.routing.base import Routing
from sim.policies.routing.round_robin import RoundRobin
from sim.trace import Trace
from sim.trace_merge import merge
from sim.workload.base import Workload
from sim.workload.source import Source
from sim.workload.token_routing.base import Tokens

TINY = "tiny_mixtral"
"""The shipped configuration that random weights are made of."""


@dataclass(frozen=True, kw_only=True)
class ExpertRun:
    """All that the ranks need to know."""

    weights: str = RANDOM
    """As `backends.serving.open_model` takes it."""
    config: Mapping[str, object] | None = None
    """Of random weights; None: that of tiny_mixtral."""
    num_attention: int = 1
    """Attention ranks."""
    num_expert_ranks: int = 1
    """Expert ranks."""
    slots_per_node: int | None = None
    """Physical experts of an expert rank; None: each expert lies on one rank, evenly."""
    num_micro_batches: int = 3
    """Planned; the rule may know better."""
    workload: Workload
    """What is served; drawn from `seed`. Open-loop."""
    batching: Batching
    micro_batching: MicroBatching = field(default_factory=PingPong)
    expert_balance: ExpertBalance = field(default_factory=Static)
    loads: Sequence[Sequence[float]] | None = None
    """Of each expert by layer, for the balance rule; None: even."""
    routing: Routing = field(default_factory=RoundRobin)
    """Chooses the attention rank that serves a request."""
    limits: ReplicaLimits
    """Of every attention rank."""
    seed: int = 0
    device: str = "cpu"
    prompts: Sequence[list[int]] | None = None
    """Token ids by request; None draws them from the seed."""
    sampler: Sampler | None = None
    """None is greedy."""
    corruption: Corruption | None = None
    """A fault to put into the first attention rank's KV cache."""
    link: EmulatedLink | None = None
    """What goes between attention and experts is delayed by; None: nothing."""
    keeps_log: bool = False
    """Whether every dispatch and its routing are noted."""
    keeps_spans: bool = False
    """Whether what each rank did is noted."""

    @property
    def count(self) -> int:
        """Micro-batches of an iteration."""
        return self.micro_batching.count(self.num_micro_batches)


class ExpertServed(NamedTuple):
    """What a run gives back."""

    trace: Trace
    answers: dict[int, list[int]]
    kv_bytes: tuple[int, int, int]
    """Written, read and freed, on all attention ranks."""
    sent: list[Sent]
    """Rows sent between attention and expert ranks, by pair."""
    log: list[Dispatched]
    """Of all attention ranks, one after another, each in the order in which it sent."""
    routed: list[tuple[int, Tokens, Any]]
    """(layer, tokens, expert ids) of all that the gates chose, where `keeps_log`."""
    spans: list[Span]
    """Seconds from t = 0."""
    samplers: list[Sampler]
    """Of every attention rank."""
    link: str | None

    def payload_bytes(self) -> Counter[tuple[int, int]]:
        """Bytes of rows by (sender, receiver)."""
        total: Counter[tuple[int, int]] = Counter()
        for one in self.sent:
            total[one.rank, one.peer] += one.payload_bytes
        return total


class _Returned(NamedTuple):
    """What one rank gives back."""

    served: NodeServed | None
    kv_bytes: tuple[int, int, int]
    sent: list[Sent]
    log: list[Dispatched]
    routed: list[tuple[int, Tokens, Any]]
    spans: list[Span]
    sampler: Sampler | None


def serve_experts(run: ExpertRun) -> ExpertServed:
    """Serve on attention and expert ranks of this machine, one process each.

    Raises:
        ValueError: the model, the workload or the sizes are refused, or a policy is.
        ChildProcessError: a rank was lost; it is named.
    """
    require_model(run.weights, run.device)
    if (clients := run.workload.clients) is not None:
        raise ValueError(
            f"workload of {clients} clients must be open-loop: every attention rank reads the "
            "arrivals by itself and they cannot wait for answers; take workload=poisson or a trace"
        )
    layout = layout_of(run, architecture_of(run))
    require_ranks(layout.size, run.device)
    arguments = (user_files(), pickle.dumps(run))
    returned: list[_Returned] = run_ranks(_rank, layout.size, arguments, run.device)
    served = [one.served for one in returned if one.served is not None]
    routes = served[0].routes
    return ExpertServed(
        merge([one.trace for one in served], *routes),
        {request: answer for one in served for request, answer in one.answers.items()},
        _added([one.kv_bytes for one in returned]),
        sorted(row for one in returned for row in one.sent),
        [row for one in returned for row in one.log],
        [row for one in returned for row in one.routed],
        [row for one in returned for row in one.spans],
        [one.sampler for one in returned if one.sampler is not None],
        None if run.link is None else run.link.label,
    )


def architecture_of(run: ExpertRun) -> Architecture:
    """The model that a run names.

    Raises:
        ValueError: a model that is not there, cannot be read, or has layers without experts.
    """
    if run.weights == RANDOM:
        architecture = runnable_architecture(_config(run), "config")
    else:
        architecture = load_model(run.weights).config
    if architecture.num_dense_layers or architecture.shared_expert_intermediate_size:
        shared = architecture.shared_expert_intermediate_size
        raise ValueError(
            f"model {architecture.name} has {architecture.num_dense_layers} layers without experts "
            f"and shared_expert_intermediate_size={shared}; attention and expert ranks run models "
            "with routed experts in every layer, such as mixtral"
        )
    return architecture


def layout_of(run: ExpertRun, architecture: Architecture) -> Layout:
    """Where everything lies.

    Raises:
        ValueError: the experts do not spread over the ranks.
    """
    for name in ("num_attention", "num_expert_ranks", "num_micro_batches"):
        if getattr(run, name) < 1:
            raise ValueError(f"{name}={getattr(run, name)} must be at least 1")
    experts, ranks = architecture.num_experts, run.num_expert_ranks
    if run.slots_per_node is None and experts % ranks:
        raise ValueError(
            f"num_expert_ranks={ranks} must divide num_experts={experts}; take another number, or "
            "give slots_per_node for replicas"
        )
    slots = experts // ranks if run.slots_per_node is None else run.slots_per_node
    view = BalanceView(_loads(run, (architecture.num_layers, experts)), ranks, slots)
    placement: Placement = checked_placement(run.expert_balance, view)
    # A micro-batch may hold the whole batch, where it is a single prompt.
    most = max(run.limits.max_num_batched_tokens, run.limits.max_num_seqs)
    return Layout(
        num_attention=run.num_attention, num_expert_ranks=ranks, num_micro_batches=run.count,
        placement=placement, max_tokens=most,
    )  # fmt: skip


def _loads(run: ExpertRun, shape: tuple[int, int]) -> NDArray[np.float64]:
    """Of each expert by layer.

    Raises:
        ValueError: loads of other layers or experts.
    """
    if run.loads is None:
        return np.ones(shape)
    lengths = sorted({len(row) for row in run.loads})
    if len(run.loads) != shape[0] or lengths != [shape[1]]:
        raise ValueError(
            f"loads of {len(run.loads)} layers with {', '.join(map(str, lengths))} experts must be "
            f"of the model's {shape[0]} layers with {shape[1]} experts; count its tokens"
        )
    return np.array(run.loads, np.float64)


def _config(run: ExpertRun) -> Mapping[str, object]:
    return shipped_config(TINY) if run.config is None else run.config


def _rank(rank: int, size: int, files: list[Path], pickled: bytes) -> _Returned:
    for path in files:
        load_file(path)
    run: ExpertRun = pickle.loads(pickled)
    model = random_model(_config(run)) if run.weights == RANDOM else load_model(run.weights)
    layout = layout_of(run, model.config)
    assert size == layout.size
    device = torch.device(run.device, rank) if run.device == "cuda" else torch.device("cpu")
    tally = Tally(rank)
    world = Collectives(range(size), tally, device, two_ways=True)
    control = Collectives(range(run.num_attention), Tally(rank))
    if rank >= run.num_attention:
        node = rank - run.num_attention
        layers = experts_of_node(model, layout, node, device)
        experts = ExpertRank(model.config, layers, layout, rank, world, run.link)
        return _serve_experts(run, experts, world)
    return _serve_attention(run, model, layout, (rank, device), world, control)


def _serve_experts(run: ExpertRun, experts: ExpertRank, world: Collectives) -> _Returned:
    experts.warm_up()
    start = _start(world)
    experts.keeps_spans = run.keeps_spans
    with without_collections():
        experts.serve()
    sent = world.tally.sent()
    return _Returned(None, (0, 0, 0), sent, [], [], _since(experts.spans, start), None)


def _serve_attention(
    run: ExpertRun, model: Model, layout: Layout, where: tuple[int, torch.device],
    world: Collectives, control: Collectives,
) -> _Returned:  # fmt: skip
    rank, device = where
    config = model.config
    transformer = Transformer(config, model.weights, device, with_experts=False)
    attention = AttentionRank(transformer, layout, rank, world, run.link)
    sampler = run.sampler or Sampler()
    replica = fresh_replica(
        transformer, run.batching, run.limits, seed=run.seed, prompts=_prompts(run),
        sampler=sampler, corruption=run.corruption if rank == 0 else None, number=rank,
    )  # fmt: skip
    pool_tokens = run.limits.num_blocks * run.limits.block_size
    router = NodeRouter(run.routing, run.num_attention, pool_tokens)
    pipeline = ExpertPipeline(
        attention, replica, router, run.micro_batching, layout.num_micro_batches, control
    )
    source = Source(run.workload, run.seed, transformer.max_context)
    attention.warm_up(run.limits)
    start = _start(world)
    attention.keeps_log, attention.keeps_spans = run.keeps_log, run.keeps_spans
    with without_collections():
        served = pipeline.serve(source, start)
    cache = replica.cache
    cache.flush()
    kv_bytes = (cache.written_bytes, cache.read_bytes, cache.freed_bytes)
    return _Returned(
        served, kv_bytes, world.tally.sent(), attention.log, attention.routed,
        _since(attention.spans, start), sampler,
    )  # fmt: skip


def _start(world: Collectives) -> float:
    """When all ranks are warm, t = 0 on the first one's clock; nothing is counted as sent yet."""
    world.all_reduce(torch.zeros(1), "start")
    clock = world.broadcast(torch.tensor([time.perf_counter()], dtype=torch.float64), "start")
    world.tally.clear()
    return float(clock)


def _since(spans: Sequence[Span], start: float) -> list[Span]:
    return [
        (resource, operation, begin - start, end - start, at)
        for resource, operation, begin, end, at in spans
    ]


def _prompts(run: ExpertRun) -> Prompts | None:
    if run.prompts is None:
        return None
    given = run.prompts
    return lambda request: given[request.request_id]


def _added(rows: Sequence[tuple[int, int, int]]) -> tuple[int, int, int]:
    written, read, freed = (sum(column) for column in zip(*rows, strict=True))
    return written, read, freed
