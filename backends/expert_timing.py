"""Times iterations of one attention rank and one expert rank: alone, at once, and in turn.

Iterations decode a fixed number of requests of a fixed context in every micro-batch. What is timed
lies in phases that follow one another while the two processes stay: they are interleaved over the
minutes of a shared machine.
"""

from __future__ import annotations

import pickle
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from backends.attention_rank import AttentionRank
from backends.collectives import Collectives, Tally
from backends.emulated_link import EmulatedLink
from backends.expert_rank import ExpertRank, experts_of_node
from backends.experts import Experts
from backends.forward_batch import Chunk, ForwardBatch
from backends.pipeline_layout import Layout
from backends.ranks import run_ranks
from backends.serving import without_collections
from backends.transformer import Transformer
from backends.weights import random_model
from sim.expert_rows import Span
from sim.policies.expert_balance.base import BalanceView
from sim.policies.expert_balance.static import Static

TIMED_CONFIG: dict[str, object] = {
    "model_type": "mixtral", "hidden_size": 384, "intermediate_size": 640, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 512,
    "max_position_embeddings": 1024, "num_local_experts": 8, "num_experts_per_tok": 2,
    "rope_theta": 1e4, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
"""A model whose attention and experts take a millisecond or two a layer on one core, both."""
BLOCK = 16


class Phase(NamedTuple):
    """Iterations that are timed together."""

    num_micro_batches: int
    tokens: int
    """Requests of a micro-batch, each of which decodes one token."""
    context: int
    """Tokens that each of them reads."""
    link: EmulatedLink | None
    iterations: int


class Timed(NamedTuple):
    """What came of a phase."""

    seconds: list[float]
    """Of each iteration, after the first."""
    attention_s: list[float]
    """Of attention in one layer for one micro-batch and of adding up what experts returned for it
    before, in all of these iterations."""
    expert_s: list[float]
    """The same of the experts."""
    outside_s: list[float]
    """Of the lm_head, for one micro-batch."""
    spans: list[Span]
    """Of the last iteration, from its start."""


class Busy(NamedTuple):
    """How long each side takes while the other one works, over how long it takes alone."""

    attention: float
    experts: float


def time_phases(phases: Sequence[Phase], config: Mapping[str, object] | None = None) -> list[Timed]:
    """Run phases one after another on two ranks.

    Raises:
        ChildProcessError: a rank was lost.
    """
    found = run_ranks(_time_rank, 2, (pickle.dumps((list(phases), dict(config or TIMED_CONFIG))),))
    return [
        _timed(phase, attention, experts)
        for phase, attention, experts in zip(phases, *found, strict=True)
    ]


def time_together(
    tokens: int, context: int, rounds: int, config: Mapping[str, object] | None = None
) -> Busy:
    """Whether two busy ranks slow each other down, without any message between them."""
    arguments = (pickle.dumps((tokens, context, rounds, dict(config or TIMED_CONFIG))),)
    attention, experts = run_ranks(_together_rank, 2, arguments)
    return Busy(attention, experts)


class _Side:
    """One rank with its half of the model, in any number of phases."""

    def __init__(self, rank: int, config: Mapping[str, object]) -> None:
        self.rank = rank
        model = random_model(config)
        self.config = model.config
        self.world = Collectives(range(2), Tally(rank), two_ways=True)
        self.transformer: Transformer | None = None
        self.experts: list[Experts] = []
        layout = self.layout(1, 1)
        if rank:
            self.experts = experts_of_node(model, layout, 0, torch.device("cpu"))
        else:
            self.transformer = Transformer(model.config, model.weights, with_experts=False)

    def layout(self, count: int, tokens: int) -> Layout:
        """Of a phase."""
        a = self.config
        placement = Static().place(
            BalanceView(np.ones((a.num_layers, a.num_experts)), 1, a.num_experts)
        )
        return Layout(
            num_attention=1, num_expert_ranks=1, num_micro_batches=count, placement=placement,
            max_tokens=tokens,
        )  # fmt: skip

    def meet(self) -> None:
        """Wait for the other rank."""
        self.world.all_reduce(torch.zeros(1), "start")

    def attend(self, phase: Phase) -> tuple[list[float], list[Span], float]:
        """The attention side of a phase: seconds, spans, and the start of the last iteration."""
        assert self.transformer is not None
        layout = self.layout(phase.num_micro_batches, phase.tokens)
        rank = AttentionRank(self.transformer, layout, 0, self.world, phase.link)
        parts, cache = decoding(self.transformer, phase)
        self.transformer.warm_up([phase.tokens], [phase.tokens])
        self.meet()
        seconds: list[float] = []
        rank.keeps_spans, begin = True, 0.0
        for number in range(phase.iterations):
            begin = time.perf_counter()
            for logits in rank.forward(parts, cache, float(number)):
                assert logits is not None
                logits.argmax(-1)
            seconds.append(time.perf_counter() - begin)
        rank.stop()
        return seconds, rank.spans, begin

    def compute(self, phase: Phase) -> tuple[list[float], list[Span], float]:
        """The expert side of a phase."""
        layout = self.layout(phase.num_micro_batches, phase.tokens)
        rank = ExpertRank(self.config, self.experts, layout, 1, self.world, phase.link)
        rank.keeps_spans = True
        self.meet()
        rank.serve()
        return [], rank.spans, 0.0


def decoding(model: Transformer, phase: Phase) -> tuple[list[list[Chunk]], Any]:
    """Chunks of every micro-batch, and a cache in which their contexts have room."""
    total = phase.num_micro_batches * phase.tokens
    blocks = -(-phase.context // BLOCK)
    cache = model.new_cache(total * blocks, BLOCK)
    vocabulary = model.config.vocab_size
    chunks = [Chunk(number, [number % vocabulary], phase.context - 1) for number in range(total)]
    for chunk in chunks:
        cache.allocate(chunk.request_id, phase.context)
    return [chunks[at : at + phase.tokens] for at in range(0, total, phase.tokens)], cache


def _time_rank(rank: int, size: int, pickled: bytes) -> list[Any]:
    del size
    phases, config = pickle.loads(pickled)
    side = _Side(rank, config)
    with without_collections():
        return [side.compute(phase) if rank else side.attend(phase) for phase in phases]


def _together_rank(rank: int, size: int, pickled: bytes) -> float:
    """Both sides work alone in turn, then both at once, again and again."""
    del size
    tokens, context, rounds, config = pickle.loads(pickled)
    side = _Side(rank, config)
    work = _layer_work(side, Phase(1, tokens, context, None, 1))
    alone: list[float] = []
    beside: list[float] = []
    for _ in range(rounds):
        for turn in (0, 1):
            side.meet()
            if turn == rank:
                alone.append(_per_call_s(work))
        side.meet()
        beside.append(_per_call_s(work))
    return statistics.median(b / a for a, b in zip(alone, beside, strict=True))


def _layer_work(side: _Side, phase: Phase) -> Any:
    """One layer of this side's half, without messages."""
    if side.transformer is None:
        a = side.config
        each = max(phase.tokens * a.experts_per_token // a.num_experts, 1)
        rows = torch.randn(each * a.num_experts, a.hidden_size)
        counts = torch.full((a.num_experts,), each, dtype=torch.int32)
        return lambda number: side.experts[number % len(side.experts)](rows, counts)
    model = side.transformer
    parts, cache = decoding(model, phase)
    batch = ForwardBatch.build(cache, parts[0])
    with torch.inference_mode():
        operators = model.begin(batch, cache)
        x = model.embed(batch)

    def attend(number: int) -> None:
        at = number % len(model.layers)
        layer = model.layers[at]
        normed, _ = layer.attend(x, torch.zeros_like(x), cache.layers[at], operators)
        layer.mlp.gate(normed)  # pyright: ignore[reportAttributeAccessIssue]

    return attend


TOGETHER_S = 0.15
"""How long a side works at a time."""


def _per_call_s(work: Any) -> float:
    count, start = 0, time.perf_counter()
    with torch.inference_mode():
        while time.perf_counter() - start < TOGETHER_S:
            work(count)
            count += 1
    return (time.perf_counter() - start) / count


def _timed(phase: Phase, attention: Any, experts: Any) -> Timed:
    seconds, ours, begin = attention
    _, theirs, _ = experts
    ours, theirs = (spans[len(spans) // phase.iterations :] for spans in (ours, theirs))

    def took_s(spans: Sequence[Span], begins: str) -> list[float]:
        return [end - start for _, what, start, end, _ in spans if what.startswith(begins)]

    layers, sums = took_s(ours, "layer"), took_s(ours, "combine")
    return Timed(
        seconds[1:], [sum(pair) for pair in zip(layers, sums, strict=True)], took_s(theirs, ""),
        took_s(ours, "lm_head"), [
            (resource, operation, start - begin, end - begin, at)
            for resource, operation, start, end, at in (*ours, *theirs) if start >= begin
        ],
    )  # fmt: skip
