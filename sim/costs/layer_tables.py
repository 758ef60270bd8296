"""Measurements of one model's layers that somebody profiled: what every format is read into."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sim.costs.attention_scale import AttentionScale, shortest_s
from sim.costs.curve import Curve
from sim.costs.roofline import RooflineKernels
from sim.costs.seconds import Seconds
from sim.costs.table import Table, table
from sim.models.work import IterationShape

Rows = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class LayerTables:
    """Rows of coordinates and, last, seconds of one rank. What was not measured is None."""

    source: str
    """Where it was read."""
    layer: Rows
    """(tokens, s) of one layer without its attention."""
    once: Rows
    """(tokens, s) of what the model does once: embedding, last norm."""
    sampled: Rows | None = None
    """(positions, s) of lm_head and sampling."""
    prompts: Rows | None = None
    """(chunk tokens, tokens before it, s) of attention of one chunk in one layer."""
    decodes: Rows | None = None
    """(requests, context of each, s) of attention in one layer."""
    mixed: Rows | None = None
    """(chunk tokens, tokens before it, requests, context of each, s) of both in one launch."""


class LayerKernels:
    """Seconds of all layers from such tables; the roofline stands in for what they lack."""

    def __init__(self, tables: LayerTables, roofline: RooflineKernels) -> None:
        """Take measurements and the roofline of the same model on the same device."""
        layers = roofline.architecture.num_layers
        self._smooth = roofline.smooth()
        self._roofline = roofline
        self._layers = layers
        tokens = tables.layer[:, 0]
        once_s = np.interp(tokens, tables.once[:, 0], tables.once[:, 1])
        total_s = layers * tables.layer[:, 1] + once_s
        self._tokens = table(
            (t, s / self._smooth.tokens(int(t)).total) for t, s in zip(tokens, total_s, strict=True)
        )
        self._sampled: Table | None = None
        if tables.sampled is not None:
            self._sampled = table(
                (n, s / self._smooth.sampled(int(n)).total) for n, s in tables.sampled
            )
        self._read_attention(tables)

    def _read_attention(self, tables: LayerTables) -> None:
        """Each launch of attention over its own account of the work."""
        self._prompts = self._decodes = self._mixed = None
        layers = self._layers
        if (rows := tables.prompts) is not None:
            self._prompt_scale = scale = self._scale(rows)
            self._prompts = table((c, h, layers * s / scale.prompts_s(chunk(c, h)))
                                  for c, h, s in rows)  # fmt: skip
        if (rows := tables.decodes) is not None:
            self._decode_scale = scale = self._scale(rows)
            self._decodes = table((n, kv, layers * s / scale.decodes_s(n, n * kv))
                                  for n, kv, s in rows)  # fmt: skip
            self._lengths = np.unique(rows[:, 1]).tolist()
        if (rows := tables.mixed) is not None:
            self._mixed_scale = self._scale(rows)
            self._mixed = table((c, h, n, kv, layers * s / self._mixed_s(chunk(c, h), n, n * kv))
                                for c, h, n, kv, s in rows)  # fmt: skip

    def _scale(self, rows: Rows) -> AttentionScale:
        return AttentionScale(self._roofline, shortest_s(rows[:, -1]))

    def tokens(self, tokens: int) -> Seconds:
        """All but attention."""
        if not tokens:
            return Seconds()
        return self._tokens.at(tokens).seconds(self._smooth.tokens(tokens).total)

    def sampled(self, positions: int) -> Seconds:
        """The lm_head and sampling."""
        if not positions:
            return Seconds()
        if self._sampled is None:
            return self._roofline.sampled(positions)
        return self._sampled.at(positions).seconds(self._smooth.sampled(positions).total)

    def prompt_attention(self, shape: IterationShape) -> Seconds:
        """Several chunks are read as one of all their tokens, with the mean of their histories.

        How full a GPU is depends on the tokens of a launch; how much there is to do is counted
        chunk by chunk, in the roofline that the ratio is of.
        """
        before = (shape.prefill_context - shape.prefill_tokens) / shape.num_prefills
        decodes, context = shape.num_decodes, shape.decode_context
        if decodes and self._mixed is not None:
            reading = self._mixed.at(shape.prefill_tokens, before, decodes, context / decodes)
            return reading.seconds(self._mixed_s(shape, decodes, context))
        if self._prompts is None:
            return self._roofline.prompt_attention(shape)
        reading = self._prompts.at(shape.prefill_tokens, before)
        seconds = reading.seconds(self._prompt_scale.prompts_s(shape))
        if not decodes:
            return seconds
        beside = max(
            self._roofline.mixed_decode_s(shape),
            self.decode_source(decodes, context).total,
        )
        return seconds.plus(Seconds(extrapolated=beside))

    def decode_attention(self, num_decodes: int) -> Curve:
        """Straight lines between the contexts that were measured."""
        if self._decodes is None:
            return self._roofline.decode_attention(num_decodes)
        knots = [num_decodes * length for length in self._lengths]
        return Curve.through(knots, lambda at: self.decode_source(num_decodes, at).total)

    def decode_source(self, num_decodes: int, context: float) -> Seconds:
        """One point of it, split by what it rests on."""
        if self._decodes is None:
            return self._roofline.decode_source(num_decodes, context)
        reading = self._decodes.at(num_decodes, context / num_decodes)
        return reading.seconds(self._decode_scale.decodes_s(num_decodes, context))

    def _mixed_s(self, shape: IterationShape, num_decodes: float, context: float) -> float:
        scale = self._mixed_scale
        return scale.prompts_s(shape) + scale.decodes_s(num_decodes, context)


def chunk(tokens: float, before: float) -> IterationShape:
    """One chunk of a prompt and nothing else."""
    return IterationShape.of([(int(tokens), int(before))], (), 0)
