"""Attention from tables of (batch, length), for prompts and for decoding requests apart."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from sim.costs.attention_scale import AttentionScale, shortest_s
from sim.costs.curve import Curve
from sim.costs.roofline import CONTEXTS, RooflineKernels
from sim.costs.seconds import Seconds
from sim.costs.table import table
from sim.models.architecture import Architecture
from sim.models.work import IterationShape

Rows = NDArray[np.float64]


class MeasuredAttention:
    """Seconds of attention in all layers, for one shape of heads.

    Decoding requests are read by the tokens that all of them read, whatever their number: those
    decide how much is moved, and whether a cache holds it.

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
        per_layer = roofline.like(architecture=single)
        launches = shortest_s(prompts[:, 2]), shortest_s(decodes[:, 2])
        self._prompt_scale, self._decode_scale = (AttentionScale(roofline, s) for s in launches)
        prompt_scale, decode_scale = (AttentionScale(per_layer, s) for s in launches)
        self._prompts = table(
            (batch, tokens, seconds / prompt_scale.prompts_s(_prompts(batch, tokens)))
            for batch, tokens, seconds in prompts.tolist()
        )
        key_bytes = 2 * heads.kv_size * roofline.kv_dtype_bytes
        self._decodes = table(
            (batch, batch * length, max(seconds, key_bytes * batch * length / floor_bytes_per_s)
             / decode_scale.decodes_s(batch, batch * length))
            for batch, length, seconds in decodes.tolist()
        )  # fmt: skip
        totals = {batch * length for batch, length, _ in decodes.tolist()}
        self._totals = sorted(totals | set(map(float, CONTEXTS)))

    def prompt_attention(self, shape: IterationShape) -> Seconds:
        """Attention of chunks, and of decoding requests beside them."""
        context = shape.prefill_context / shape.num_prefills
        reading = self._prompts.at(shape.num_prefills, context)
        seconds = reading.seconds(self._prompt_scale.prompts_s(shape))
        if not self._own or shape.prefill_context > shape.prefill_tokens:
            seconds = seconds.as_extrapolated()
        if not shape.num_decodes:
            return seconds
        alone = self.decode_source(shape.num_decodes, shape.decode_context)
        mixed = self.roofline.mixed_decode_s(shape)
        return seconds.plus(Seconds(extrapolated=max(mixed, alone.total)))

    def decode_attention(self, num_decodes: int) -> Curve:
        """Straight lines between the contexts that were measured, and a doubling grid beyond."""
        knots = [float(num_decodes), *(at for at in self._totals if at > num_decodes)]
        return Curve.through(knots, lambda at: self.decode_source(num_decodes, at).total)

    def decode_source(self, num_decodes: int, context: float) -> Seconds:
        """Seconds of one point, split by what it rests on."""
        reading = self._decodes.at(num_decodes, context)
        seconds = reading.seconds(self._decode_scale.decodes_s(num_decodes, context))
        return seconds if self._own else seconds.as_extrapolated()


def _prompts(batch: float, tokens: float) -> IterationShape:
    return IterationShape.of([(int(tokens), 0)] * int(batch), (), 0)
