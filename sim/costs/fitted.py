"""Seconds from coefficients that `diptych calibrate` fitted on the machine at hand.

    seconds = body(tokens) + head(sampled) + pairs * a + prefills * b + decodes * c + context * d

`body` and `head` are piecewise linear: a matrix product of few rows does not get cheaper in
proportion. `context` is last so that a decode stretch is one multiplication and one addition away.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardware_models.schema import FittedIteration
from sim.costs.base import SHORT_RUN
from sim.models.work import IterationShape


class Fitted:
    """The cost of one model on one calibrated machine."""

    def __init__(self, fit: FittedIteration, slow_down: float = 1.0) -> None:
        """Take over a fit of iterations alone on the machine.

        Args:
            fit: the coefficients.
            slow_down: how many times as long pipeline stages take that compute at the same time.
        """
        self.fit, self.slow_down = fit, slow_down
        coefficients = fit.coefficients
        self._pair_s = coefficients["prefill_pair_s"]
        self._prefill_s = coefficients["prefill_s"]
        self._decode_s = coefficients["decode_s"]
        self._context_s = coefficients["context_token_s"]
        self._fixed_s: dict[tuple[int, int], float] = {}

    def iteration_s(self, shape: IterationShape) -> float:
        """Seconds of one iteration."""
        fixed = self._products_s(shape.prefill_tokens + shape.num_decodes, shape.sampled_tokens)
        fixed += shape.prefill_pairs * self._pair_s
        fixed += shape.num_prefills * self._prefill_s + shape.num_decodes * self._decode_s
        return fixed + shape.decode_context * self._context_s

    def decode_run_s(self, num_decodes: int, decode_context: int, iterations: int) -> list[float]:
        """Seconds of each iteration of a decode stretch."""
        fixed = self._products_s(num_decodes, num_decodes) + num_decodes * self._decode_s
        context_s = self._context_s
        stop = decode_context + num_decodes * iterations
        contexts = range(decode_context, stop, num_decodes)
        if iterations < SHORT_RUN:
            return [fixed + context * context_s for context in contexts]
        return (fixed + np.arange(decode_context, stop, num_decodes) * context_s).tolist()

    def sampled_s(self, positions: int) -> float:
        """Of these, the seconds of the lm_head and sampling."""
        return interpolate(self.fit.head_tokens, self.fit.head_s, positions)

    def measured_iterations(self, decisions: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        """How many of a decision's iterations are no larger than what was measured; the first ones.

        A chunk's context counts as measured up to the longest batch that was: plain prompts.

        Args:
            decisions: the fields of the first `IterationShape`, and `repeat`: iterations, of which
                each reads one token more a decoding request than the one before.
        """
        fit, decodes = self.fit, decisions["num_decodes"]
        inside = (
            (decisions["prefill_tokens"] + decodes <= fit.body_tokens[-1])
            & (decisions["sampled_tokens"] <= fit.head_tokens[-1])
            & (decisions["prefill_context"] <= decisions["num_prefills"] * fit.body_tokens[-1])
        )
        room = decodes * fit.max_context_tokens - decisions["decode_context"]
        steps = np.where(decodes > 0, room // np.maximum(decodes, 1) + 1, decisions["repeat"])
        return np.where(inside, np.clip(steps, 0, decisions["repeat"]), 0)

    def _products_s(self, tokens: int, sampled: int) -> float:
        key = (tokens, sampled)
        if key not in self._fixed_s:
            fit = self.fit
            self._fixed_s[key] = interpolate(fit.body_tokens, fit.body_s, tokens) + interpolate(
                fit.head_tokens, fit.head_s, sampled
            )
        return self._fixed_s[key]


def interpolate(knots: Sequence[float], values: Sequence[float], at: float) -> float:
    """Piecewise linear through (knots, values), going on with the last slope; 0 at 0 tokens."""
    if at <= 0:
        return 0.0
    index = min(max(bisect_right(knots, at), 1), len(knots) - 1)
    low, high = knots[index - 1], knots[index]
    share = (at - low) / (high - low)
    return values[index - 1] + share * (values[index] - values[index - 1])
