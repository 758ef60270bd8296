"""An expert rank: waits for the rows of a micro-batch, computes its experts, sends them back."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from backends.collectives import Collectives
from backends.emulated_link import EmulatedLink
from backends.experts import Experts
from backends.m2n import COMBINE, DISPATCH, Channel, Delivery
from backends.pipeline_layout import Layout
from backends.placing import Placer
from backends.transformer import synchronise
from backends.weights import Model
from sim.expert_rows import Span
from sim.models.architecture import Architecture

WARM_ROWS = 64
"""Rows of an expert up to which every number is computed once before the start."""


class ExpertRank:
    """The experts of one node in every layer."""

    def __init__(
        self, config: Architecture, layers: Sequence[Experts], layout: Layout, rank: int,
        world: Collectives, link: EmulatedLink | None = None,
    ) -> None:  # fmt: skip
        """Meet the attention ranks.

        Args:
            config: of the whole model.
            layers: this rank's experts, as `experts_of_node` lays them out.
            layout: of the run.
            rank: this one's number in the run.
            world: all ranks.
            link: delays what is sent.
        """
        self.layers, self._layout, self._device = layers, layout, world.device
        self.node = rank - layout.num_attention
        messages = layout.messages(config, torch.float32)
        depth = layout.num_micro_batches
        sources = range(layout.num_attention)
        self._inward = [Channel(world, one, messages, depth, DISPATCH) for one in sources]
        self._outward = [Channel(world, one, messages, depth, COMBINE, link) for one in sources]
        self._hidden = config.hidden_size
        self.spans: list[Span] = []
        self.keeps_spans = False

    def warm_up(self) -> None:
        """Compute once with as many rows as a small batch may bring."""
        width = self._hidden
        experts = self.layers[0]  # the shapes of the others are the same
        for each in range(1, WARM_ROWS + 1):
            counts = torch.full((len(experts.expert_ids),), each, dtype=torch.int32)
            rows = torch.zeros(each * len(counts), width, device=self._device)
            experts(rows, counts.to(self._device))

    def serve(self) -> None:
        """Serve iteration after iteration until all attention ranks stop."""
        for channel in self._inward:
            for _ in range(self._layout.num_micro_batches):
                channel.post()
        with torch.inference_mode():
            while self._iterate():
                pass
        for channel in self._inward:
            channel.drain()
        for channel in self._outward:
            channel.flush()

    def _iterate(self) -> bool:
        """One iteration; False when there is none any more."""
        for layer, experts in enumerate(self.layers):
            for micro_batch in range(self._layout.num_micro_batches):
                came = [channel.receive() for channel in self._inward]
                if any(one.stops for one in came):
                    return False
                begin_s = time.perf_counter()
                self._compute(experts, came)
                if self.keeps_spans:
                    synchronise(self._device)
                    operation = f"layer {layer}"
                    resource = f"experts {self.node}"
                    end_s = time.perf_counter()
                    self.spans.append((resource, operation, begin_s, end_s, micro_batch))
        return True

    def _compute(self, experts: Experts, came: list[Delivery]) -> None:
        """Compute what came from all attention ranks together, and send it back to each."""
        rows, counts = _by_expert(came)
        # What came has been copied: the next micro-batch may come into the same buffers.
        computed = experts(rows, counts)
        for channel in self._inward:
            channel.post()
        for channel, one, part in zip(self._outward, came, _by_source(computed, came), strict=True):
            if len(part):
                channel.send(part, one.counts, "combine")


def experts_of_node(model: Model, layout: Layout, node: int, device: torch.device) -> list[Experts]:
    """The experts of an expert node, layer by layer, and no other weights."""
    place = Placer(model.weights, device, torch.float32)
    return [
        place.experts(layer, layout.experts_of(node, layer))
        for layer in range(model.config.num_layers)
    ]


def _by_expert(came: list[Delivery]) -> tuple[Tensor, Tensor]:
    """Rows of all sources by expert and then by source, and how many each expert has."""
    counts = torch.tensor([one.counts for one in came], dtype=torch.int32)
    if counts.shape[1] == 1:
        rows = torch.cat([one.rows for one in came])
    else:
        parts = [one.rows.split(one.counts) for one in came]
        rows = torch.cat([part for expert in zip(*parts, strict=True) for part in expert])
    return rows, counts.sum(0, dtype=torch.int32).to(rows.device)


def _by_source(rows: Tensor, came: list[Delivery]) -> list[Tensor]:
    """What `_by_expert` put together, apart again: of each source, by expert."""
    sizes = [
        count for expert in zip(*(one.counts for one in came), strict=True) for count in expert
    ]
    parts, sources = rows.split(sizes), len(came)
    return [torch.cat(parts[source::sources]) for source in range(sources)]
