"""Fit the cost of an iteration to measured shapes, and judge it on shapes that it has not seen.

Each shape counts by its relative error, so that short iterations matter as much as long ones. All
coefficients and slopes are at least zero: more work never takes less time.
"""

# pyright: basic
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hardware_models.calibration import COEFFICIENTS, FittedIteration
from sim.costs.fitted import Fitted
from sim.models.work import IterationShape

BODY_TOKENS = (1.0, 6.0, 7.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
HEAD_TOKENS = (1.0, 6.0, 7.0, 8.0, 16.0, 32.0)
"""Bends of the two curves. CPU kernels take up to six rows at the price of one; the seventh costs
a step."""

NUM_QUANTILES = 200
"""Of the jitter: enough for a 99th percentile."""

STALL = 2.5
"""A timing so many times the usual says nothing about its batch."""


class Measured(NamedTuple):
    """A shape and how long it took."""

    shape: IterationShape
    seconds: float


def fit_iteration(
    train: Sequence[Measured], heldout: Sequence[Measured], dtype: str
) -> FittedIteration:
    """Coefficients that minimise the relative error on `train`, judged on `heldout`.

    Args:
        train: measured shapes, more than there are coefficients.
        heldout: measured shapes that `train` lacks.
        dtype: type of weights and activations, for the record.

    Raises:
        ValueError: too few shapes, or a held-out one that was fitted.
    """
    common = {m.shape for m in train} & {m.shape for m in heldout}
    if common or not heldout:
        raise ValueError(
            f"{len(heldout)} held-out shapes, {len(common)} of them fitted; hold out shapes that "
            "the fit does not see"
        )
    body = _knots(BODY_TOKENS, max(m.shape.tokens for m in train))
    head = _knots(HEAD_TOKENS, max(m.shape.sampled_tokens for m in train))
    rows = np.array([_features(m.shape, body, head) for m in train])
    if len(rows) < rows.shape[1]:
        raise ValueError(
            f"{len(rows)} shapes cannot settle {rows.shape[1]} coefficients; measure more shapes"
        )
    found = _robust(rows, np.array([m.seconds for m in train]))
    fit = FittedIteration(
        body_tokens=list(body),
        body_s=np.cumsum(found[: len(body)]).tolist(),
        head_tokens=list(head),
        head_s=np.cumsum(found[len(body) : len(body) + len(head)]).tolist(),
        coefficients=dict(zip(COEFFICIENTS, found[len(body) + len(head) :].tolist(), strict=True)),
        heldout_median_error=0.0,
        heldout_p90_error=0.0,
        max_context_tokens=_largest_context(train),
        num_shapes=len(train),
        num_heldout=len(heldout),
        dtype=dtype,
    )
    errors = relative_errors(fit, heldout)
    fit.heldout_median_error = float(np.median(errors))
    fit.heldout_p90_error = float(np.percentile(errors, 90))
    return fit


def jitter_quantiles(ratios: Sequence[float]) -> list[float]:
    """What a fit stores of timings over the means of their like; nothing of none."""
    if not ratios:
        return []
    places = (np.arange(NUM_QUANTILES) + 0.5) / NUM_QUANTILES
    return np.quantile(ratios, places).round(4).tolist()


def relative_errors(fit: FittedIteration, measured: Sequence[Measured]) -> NDArray[np.float64]:
    """|predicted - measured| / measured of each shape."""
    cost = Fitted(fit)
    return np.array([abs(cost.iteration_s(m.shape) / m.seconds - 1) for m in measured])


def _robust(rows: NDArray[np.float64], seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least relative error at coefficients from zero up.

    Dividing by the measured seconds would favour fast timings and predict below the mean; the
    second and third round divide by what the round before predicts. What took far longer than that
    met a stall and is left out.
    """
    from scipy.optimize import nnls  # only whoever fits waits for it

    scale, kept = seconds, np.ones(len(seconds), np.bool_)
    for _ in range(3):
        weighted = rows[kept] / scale[kept, None]
        found, _ = nnls(weighted, seconds[kept] / scale[kept])
        scale = np.maximum(rows @ found, 1e-3 * seconds)
        kept = seconds <= STALL * scale
        if kept.sum() < rows.shape[1]:
            break
    return found


def _largest_context(measured: Sequence[Measured]) -> int:
    """Mean context of a decoding request in the measured shape where it is largest."""
    decoding = [m.shape for m in measured if m.shape.num_decodes]
    return max((s.decode_context // s.num_decodes for s in decoding), default=0)


def _knots(knots: Sequence[float], largest: float) -> tuple[float, ...]:
    """Those knots that the measurements pass, and the largest measurement as the last."""
    return (*(knot for knot in knots if knot < largest), float(largest))


def _features(shape: IterationShape, body: Sequence[float], head: Sequence[float]) -> list[float]:
    """What the coefficients multiply: hat functions' cumulative form, then four counts."""
    return [
        *_ramps(shape.tokens, body),
        *_ramps(shape.sampled_tokens, head),
        shape.prefill_pairs,
        shape.num_prefills,
        shape.num_decodes,
        shape.decode_context,
    ]


def _ramps(at: float, knots: Sequence[float]) -> list[float]:
    """How much of the first value and of each rise between knots a batch of `at` tokens has.

    Past the last knot the last rise goes on, as `fitted.interpolate` does.
    """
    if at <= 0:
        return [0.0] * len(knots)
    shares = [1.0]
    for index in range(1, len(knots)):
        low, high = knots[index - 1], knots[index]
        share = (at - low) / (high - low)
        last = index == len(knots) - 1
        shares.append(max(share, 0.0) if last else min(max(share, 0.0), 1.0))
    return shares
