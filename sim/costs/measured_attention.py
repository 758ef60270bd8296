"""Attention from tables of (batch, length), for prompts and for decoding requests apart."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from sim.costs.curve import Curve
from sim.costs.roofline import CONTEXTS, RooflineKernels
from sim.costs.seconds import Seconds
from sim.costs.table import table
from sim.models.architecture import Architecture
from sim.models.work import IterationShape

Rows = NDArray[np.float64]


class MeasuredAttention:
    """Seconds of attention in all layers, for one shape of heads.

    The tables know whole prompts and decoding requests of equal contexts, not mixtures. Chunks that
    continue a prompt take the ratio of a prompt as long as their context; decoding requests beside
    chunks what `RooflineKernels` says of them. Both are counted as extrapolated.
    """

    def __init__(
        self, prompts: Rows, decodes: Rows, roofline: RooflineKernels, *, floor_bytes_per_s: float,
        measured_as: Architecture | None = None,
    ) -> None:  # fmt: skip
        """Take the tables.

        Args:
            prompts: rows of (batch, prompt tokens, seconds of one layer).
            decodes: rows of (batch, context tokens, seconds of one layer).
            roofline: of the model on the device.
            floor_bytes_per_s: what the memory delivers; a faster reading was of cached keys.
            measured_as: the heads that the tables are of, when they are not the model's own;
                the roofline's ratio carries over and all is extrapolated.
        """
        self.roofline = roofline
        self._own = measured_as is None
        heads = roofline.architecture if measured_as is None else measured_as
        single = replace(heads, num_layers=1, sparse_layers=heads.sparse_layers and (0,))
        self._smooth = roofline.smooth()
        self._per_layer = self._smooth.like(architecture=single)
        self._floor_bytes_per_s = floor_bytes_per_s
        self._prompts = table(
            (batch, tokens, seconds / self._per_layer.prompts_s(_prompts(batch, tokens)))
            for batch, tokens, seconds in prompts.tolist()
        )
        self._decodes = table(
            (batch, kv, self._decode_ratio(batch, kv, seconds))
            for batch, kv, seconds in decodes.tolist()
        )
        self._lengths = sorted({float(kv) for kv in decodes[:, 1]} | set(map(float, CONTEXTS)))

    def prompt_attention(self, shape: IterationShape) -> Seconds:
        """Attention of chunks, and of decoding requests beside them."""
        context = shape.prefill_context / shape.num_prefills
        reading = self._prompts.at(shape.num_prefills, context)
        seconds = reading.seconds(self._smooth.prompts_s(shape))
        if not self._own or shape.prefill_context > shape.prefill_tokens:
            seconds = seconds.as_extrapolated()
        if not shape.num_decodes:
            return seconds
        alone = self.decode_source(shape.num_decodes, shape.decode_context)
        mixed = self.roofline.mixed_decode_s(shape.num_decodes, shape.decode_context)
        return seconds.plus(Seconds(extrapolated=max(mixed, alone.total)))

    def decode_attention(self, num_decodes: int) -> Curve:
        """Straight lines between the lengths that were measured, and a doubling grid beyond."""
        knots = [num_decodes * length for length in self._lengths]
        return Curve.through(knots, lambda at: self.decode_source(num_decodes, at).total)

    def decode_source(self, num_decodes: int, context: float) -> Seconds:
        """Seconds of one point, split by what it rests on."""
        reading = self._decodes.at(num_decodes, context / num_decodes)
        seconds = reading.seconds(self._smooth.decode_source(num_decodes, context).total)
        return seconds if self._own else seconds.as_extrapolated()

    def _decode_ratio(self, batch: float, length: float, seconds: float) -> float:
        a = self._per_layer.architecture
        read_bytes = 2 * a.kv_size * batch * length * self.roofline.kv_dtype_bytes
        seconds = max(seconds, read_bytes / self._floor_bytes_per_s)
        return seconds / self._per_layer.decode_source(int(batch), batch * length).total


def _prompts(batch: float, tokens: float) -> IterationShape:
    return IterationShape.of([(int(tokens), 0)] * int(batch), (), 0)
