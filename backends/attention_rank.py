"""An attention rank: micro-batches go from its attention to the experts and come back, in turn.

While one micro-batch is with the experts, attention computes the others. It waits for a micro-batch
only when that one's turn has come again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from backends.collectives import Collectives
from backends.emulated_link import EmulatedLink
from backends.experts import Mixture
from backends.forward_batch import Chunk, ForwardBatch
from backends.kernels.expert_combine import expert_combine
from backends.kv_cache import PagedKVCache
from backends.m2n import COMBINE, DISPATCH, Channel
from backends.operators import Operators
from backends.pipeline_layout import Layout
from backends.transformer import Transformer, synchronise
from sim.dispatch_log import Dispatched, first_turn, listed
from sim.engine import ReplicaLimits
from sim.expert_rows import Span
from sim.state.expert_dispatch import Dispatch, dispatch
from sim.workload.token_routing.base import Tokens


class Away(NamedTuple):
    """A micro-batch whose rows are with the experts."""

    sent: Dispatch
    positions: Tensor
    """int32 [tokens, top_k]: where in the rows each choice is."""
    weights: Tensor
    """float32 [tokens, top_k]"""
    order: Tensor
    """int64 [rows], rows by expert node and slot."""


class InFlight:
    """One micro-batch on its way through the layers."""

    def __init__(self, chunks: Sequence[Chunk], batch: ForwardBatch, operators: Operators,
                 x: Tensor) -> None:  # fmt: skip
        self.chunks, self.batch, self.operators = chunks, batch, operators
        self.x, self.residual = x, torch.zeros_like(x)
        self.away: Away | None = None
        self.tokens = tokens_of(batch, chunks)


def tokens_of(batch: ForwardBatch, chunks: Sequence[Chunk]) -> Tokens:
    """Request and position of every row of a batch, whose decodes come first."""
    ordered = sorted(chunks, key=lambda chunk: len(chunk.token_ids) > 1)
    request_ids = np.repeat(
        [chunk.request_id for chunk in ordered], [len(chunk.token_ids) for chunk in ordered]
    )
    return Tokens(request_ids.astype(np.int64), batch.positions.numpy())


class AttentionRank:
    """Attention of every layer, and the way of its tokens to the experts."""

    def __init__(
        self, model: Transformer, layout: Layout, rank: int, world: Collectives,
        link: EmulatedLink | None = None,
    ) -> None:  # fmt: skip
        """Meet the expert ranks.

        Args:
            model: attention, norms and gates.
            layout: of the run.
            rank: this one's number in the run.
            world: all ranks.
            link: delays what is sent.
        """
        self.model, self._layout, self.node = model, layout, rank
        messages = layout.messages(model.config, model.dtype)
        depth = layout.num_micro_batches
        peers = layout.expert_ranks
        self._outward = [Channel(world, one, messages, depth, DISPATCH, link) for one in peers]
        self._inward = [Channel(world, one, messages, depth, COMBINE) for one in peers]
        self.log: list[Dispatched] = []
        self.keeps_log = False
        self.routed: list[tuple[int, Tokens, np.ndarray]] = []
        """(layer, tokens, expert ids) of all that was routed, where the log is kept."""
        self.spans: list[Span] = []
        self.keeps_spans = False

    def warm_up(self, limits: ReplicaLimits) -> None:
        """Multiply by every shape of weight for all small batches, and some larger ones."""
        most = min(limits.max_num_batched_tokens, self.model.max_context)
        sizes = [*range(1, min(most, 128) + 1), *range(160, most + 1, 32)]
        self.model.warm_up(sizes, range(1, limits.max_num_seqs + 1))

    @torch.inference_mode()
    def forward(
        self, parts: Sequence[Sequence[Chunk]], cache: PagedKVCache, instant_s: float
    ) -> list[Tensor | None]:
        """One iteration; logits float32 [sampled, vocab] of every micro-batch, None for empty ones.

        Args:
            parts: the chunks of each micro-batch, in order.
            cache: of this rank, with room for them.
            instant_s: of the decision.
        """
        flights = [self._begin(chunks, cache) if chunks else None for chunks in parts]
        for layer in range(self.model.config.num_layers):
            for at, flight in enumerate(flights):
                self._layer(layer, at, flight, cache, instant_s)
        return [self._end(at, flight) for at, flight in enumerate(flights)]

    def stop(self) -> None:
        """Let the experts go."""
        for channel in self._outward:
            channel.stop()
        for channel in self._outward:
            channel.flush()

    def _begin(self, chunks: Sequence[Chunk], cache: PagedKVCache) -> InFlight:
        batch = ForwardBatch.build(cache, chunks)
        operators = self.model.begin(batch, cache)
        return InFlight(chunks, batch, operators, self.model.embed(batch))

    def _layer(
        self, layer: int, at: int, flight: InFlight | None, cache: PagedKVCache, instant_s: float
    ) -> None:
        """Attention of one micro-batch in one layer, and its rows sent to the experts."""
        if flight is None:
            for channel in self._outward:  # experts wait for a word of every attention rank
                channel.send(
                    self._no_rows(), [0] * self._layout.placement.slots_per_node, "dispatch"
                )
            return
        self._return(at, flight)
        begin_s = time.perf_counter()
        part = self.model.layers[layer]
        mixture = part.mlp
        assert isinstance(mixture, Mixture)
        normed, flight.residual = part.attend(
            flight.x, flight.residual, cache.layers[layer], flight.operators
        )
        routed = mixture.gate(normed)
        ids = routed.expert_ids.cpu().numpy()
        held, each = self._layout.placement.physical_to_logical[layer], self._slots
        sent = dispatch(ids, held, each, first_turn(self.node, at))
        order = torch.from_numpy(sent.order)
        positions = torch.empty(len(order), dtype=torch.int32)
        positions[order] = torch.arange(len(order), dtype=torch.int32)
        flight.away = Away(
            sent, positions.view(ids.shape).to(normed.device), routed.weights,
            order.to(normed.device),
        )  # fmt: skip
        index = flight.away.order // ids.shape[1]
        parts = self._send(normed.index_select(0, index), sent)
        if self.keeps_log:
            place = (instant_s, layer, at, self.node)
            chosen = sent.slots.ravel()[order.numpy()]
            self.log += listed(place, flight.tokens, index.cpu().numpy(), chosen, parts)
            self.routed.append((layer, flight.tokens, ids))
        self._span(f"layer {layer}", begin_s, at)

    def _send(self, rows: Tensor, sent: Dispatch) -> list[int]:
        """To every expert rank its rows, and how many each got; those that get none hear of it."""
        counts = sent.slot_rows.reshape(-1, self._slots).tolist()
        parts = rows.split(sent.node_rows.tolist())
        for channel, part, count in zip(self._outward, parts, counts, strict=True):
            channel.send(part, count, "dispatch")
        for channel, part in zip(self._inward, parts, strict=True):
            if len(part):
                channel.post()
        return [len(part) for part in parts]

    def _return(self, at: int, flight: InFlight) -> None:
        """Wait for what the experts made of a micro-batch, and add it up for each token."""
        away, model = flight.away, self.model
        if away is None:
            return
        sizes = away.sent.node_rows.tolist()
        came = [
            channel.receive().rows if size else None
            for channel, size in zip(self._inward, sizes, strict=True)
        ]
        begin_s = time.perf_counter()
        shape = (len(away.order), model.config.hidden_size)
        rows = torch.empty(shape, dtype=model.dtype, device=model.device)
        for part, one in zip(rows.split(sizes), came, strict=True):
            if one is not None:
                part.copy_(one)
        flight.x = expert_combine(rows, away.positions, away.weights)
        self._span("combine", begin_s, at)

    def _end(self, at: int, flight: InFlight | None) -> Tensor | None:
        if flight is None:
            return None
        self._return(at, flight)
        begin_s = time.perf_counter()
        logits = self.model.logits(flight.x, flight.residual, flight.batch, flight.operators)
        self._span("lm_head", begin_s, at)
        return logits

    @property
    def _slots(self) -> int:
        return self._layout.placement.slots_per_node

    def _no_rows(self) -> Tensor:
        model = self.model
        return torch.empty((0, model.config.hidden_size), dtype=model.dtype, device=model.device)

    def _span(self, operation: str, begin_s: float, micro_batch: int) -> None:
        if self.keeps_spans:
            synchronise(self.model.device)
            resource, end_s = f"attention {self.node}", time.perf_counter()
            self.spans.append((resource, operation, begin_s, end_s, micro_batch))
