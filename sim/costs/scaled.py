"""Seconds of a replica's iterations from a scaling base: one instance, one degree.

A chunk costs what it adds to the squares of the lengths. An iteration that prefills and decodes
reads the weights once: of the two bases it takes the larger.
"""

import numpy as np

from hardware_models.scaling import ScalingBase
from sim.costs.base import SHORT_RUN
from sim.models.work import IterationShape


class ScaledIteration:
    """A `StagedCost` of a replica that is one instance of a scaling base."""

    slow_down = 1.0

    def __init__(self, base: ScalingBase, overhead_s: float = 0.0) -> None:
        """Take over the coefficients.

        Args:
            base: its first degree counts.
            overhead_s: what the engine adds to each iteration, beyond what was measured.
        """
        self.base, self._overhead_s = base, overhead_s
        self._prefill, self._decode = base.prefill[0], base.decode
        self._decode_s = self._decode.request_s + self._decode.master_request_s

    def iteration_s(self, shape: IterationShape) -> float:
        """Seconds of one iteration."""
        fixed = self._overhead_s + shape.num_decodes * self._decode_s
        if shape.num_prefills:
            one = self._prefill
            squares = 2 * shape.prefill_pairs - shape.prefill_tokens
            fixed += one.token_s * shape.prefill_tokens + one.square_s * squares
            fixed += max(one.base_s, self._decode.base_s if shape.num_decodes else 0.0)
        else:
            fixed += self._decode.base_s
        return fixed + shape.decode_context * self._decode.context_token_s

    def decode_run_s(self, num_decodes: int, decode_context: int, iterations: int) -> list[float]:
        """Seconds of each iteration of a decode stretch."""
        fixed = self._overhead_s + num_decodes * self._decode_s + self._decode.base_s
        context_s = self._decode.context_token_s
        stop = decode_context + num_decodes * iterations
        if iterations < SHORT_RUN:
            return [
                fixed + context * context_s for context in range(decode_context, stop, num_decodes)
            ]
        return (fixed + np.arange(decode_context, stop, num_decodes) * context_s).tolist()

    def sampled_s(self, positions: int) -> float:
        """Nothing that is known apart: such replicas have one stage."""
        del positions
        return 0.0
