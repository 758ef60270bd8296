"""Seconds from datasheet numbers alone: each operator takes the longer of computing and moving.

Williams, Waterman, Patterson, "Roofline" (CACM 2009). Operators run one after another; none of them
overlaps another. An optimistic bound: real kernels reach a share of either peak.
"""

import numpy as np

from sim.costs.base import SHORT_RUN
from sim.models.architecture import Architecture
from sim.models.work import IterationShape, Operator, iteration_operators


class Roofline:
    """The cost of one model on one device."""

    def __init__(
        self,
        architecture: Architecture,
        *,
        flops_per_s: float,
        bytes_per_s: float,
        dtype_bytes: int,
        kv_dtype_bytes: int,
        overhead_s: float = 0.0,
    ) -> None:
        """Take a device's peaks.

        Args:
            architecture: the model.
            flops_per_s: peak of the matrix units in the model's type.
            bytes_per_s: peak of the memory.
            dtype_bytes: bytes of an element of weights and activations.
            kv_dtype_bytes: bytes of an element of the KV cache.
            overhead_s: what an engine adds to every iteration.
        """
        self.architecture = architecture
        self.flops_per_s = flops_per_s
        self.bytes_per_s = bytes_per_s
        self.dtype_bytes = dtype_bytes
        self.kv_dtype_bytes = kv_dtype_bytes
        self.overhead_s = overhead_s
        self._linears_s: dict[tuple[int, int], float] = {}
        self._prefill = self._attention(decode=False)
        self._decode = self._attention(decode=True)

    def operator_s(self, operator: Operator) -> float:
        """Seconds of all executions of one operator."""
        moved = operator.bytes_read + operator.bytes_written
        return operator.count * max(operator.flops / self.flops_per_s, moved / self.bytes_per_s)

    def iteration_s(self, shape: IterationShape) -> float:
        """Seconds of one iteration."""
        seconds = self._linear_s(shape.prefill_tokens + shape.num_decodes, shape.sampled_tokens)
        if shape.prefill_tokens:
            pair_s, token_s, context_s = self._prefill
            moving = shape.prefill_tokens * token_s + shape.prefill_context * context_s
            seconds += max(shape.prefill_pairs * pair_s, moving)
        if shape.num_decodes:
            pair_s, token_s, context_s = self._decode
            moving = shape.num_decodes * token_s + shape.decode_context * context_s
            seconds += max(shape.decode_context * pair_s, moving)
        return seconds

    def decode_run_s(self, num_decodes: int, decode_context: int, iterations: int) -> list[float]:
        """Seconds of each iteration of a decode stretch."""
        seconds = self._linear_s(num_decodes, num_decodes)
        pair_s, token_s, context_s = self._decode
        tokens_s = num_decodes * token_s
        stop = decode_context + num_decodes * iterations
        if iterations < SHORT_RUN:
            return [
                seconds + max(context * pair_s, tokens_s + context * context_s)
                for context in range(decode_context, stop, num_decodes)
            ]
        contexts = np.arange(decode_context, stop, num_decodes)
        return (seconds + np.maximum(contexts * pair_s, tokens_s + contexts * context_s)).tolist()

    def _linear_s(self, tokens: int, sampled: int) -> float:
        """Everything but attention, which depends on these two numbers only."""
        key = (tokens, sampled)
        if key not in self._linears_s:
            shape = IterationShape(tokens, 0, 0, 1, 0, 0, sampled)
            operators = self._operators(shape)
            self._linears_s[key] = self.overhead_s + sum(
                self.operator_s(op) for op in operators if not op.name.startswith("attention")
            )
        return self._linears_s[key]

    def _attention(self, decode: bool) -> tuple[float, float, float]:
        """Seconds for each query-key pair (computing), token and context token (moving).

        Attention is linear in its shape, so three probes of the operator table give all three.
        """

        def probe(pairs: int, context: int) -> Operator:
            shape = IterationShape(1, pairs, context, 1, 0, 0, 0)
            if decode:
                shape = IterationShape(0, 0, 0, 0, 1, context, 0)
            return next(op for op in self._operators(shape) if op.name.startswith("attention"))

        none, one = probe(0, 0), probe(1, 1)
        token_bytes = none.bytes_read + none.bytes_written
        context_bytes = one.bytes_read + one.bytes_written - token_bytes
        layers = one.count
        return (
            layers * one.flops / self.flops_per_s,
            layers * token_bytes / self.bytes_per_s,
            layers * context_bytes / self.bytes_per_s,
        )

    def _operators(self, shape: IterationShape) -> list[Operator]:
        return iteration_operators(self.architecture, shape, self.dtype_bytes, self.kv_dtype_bytes)
