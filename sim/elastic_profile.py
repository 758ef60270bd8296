# pyright: basic
"""What profiling a cost tells a plan of elastic instances. scipy comes without complete types."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hardware_models.scaling import DecodeScaling, PrefillScaling, ScalingBase
from sim.costs.elastic import DecodeWork, ElasticCost

PROBES = (64, 512, 4096, 32_768, 131_072)
"""Prompt lengths at which a cost is asked for what a plan may know of it."""


def profiled_base(cost: ElasticCost, max_degree: int, model: str) -> ScalingBase:
    """What profiling a cost tells a plan: equation 7 of LoongServe, fitted to single prompts.

    Relative least squares, no coefficient negative, none above that of fewer instances.

    Args:
        cost: of groups.
        max_degree: instances of the largest one.
        model: its name.
    """
    prefill: list[PrefillScaling] = []
    for degree in range(1, max_degree + 1):
        seconds = np.array([cost.prefill_s(degree, [length]) for length in PROBES])
        prefill.append(fitted_prefill(PROBES, seconds, prefill[-1] if prefill else None))
    return ScalingBase(
        name="profiled", model=model, device="as the scenario's",
        prefill=prefill, decode=_profiled_decode(cost),
        source="fitted to the scenario's own cost",
    )  # fmt: skip


def fitted_prefill(
    lengths: Sequence[int], seconds: Sequence[float] | NDArray[np.float64],
    fewer: PrefillScaling | None,
) -> PrefillScaling:  # fmt: skip
    """Coefficients of one degree, from single prompts.

    Args:
        lengths: tokens of each.
        seconds: that each took.
        fewer: coefficients of one instance fewer, which bound these; None: there is none.
    """
    tokens = np.array(lengths, np.float64)
    terms = np.stack([np.ones_like(tokens), tokens, tokens**2], 1)
    base_s, token_s, square_s = _least_squares(terms / np.asarray(seconds)[:, None])
    if fewer is not None:
        token_s, square_s = min(token_s, fewer.token_s), min(square_s, fewer.square_s)
    return PrefillScaling(base_s=max(base_s, 1e-9), token_s=token_s, square_s=square_s)


def fitted_decode(works: Sequence[DecodeWork], seconds: Sequence[float]) -> DecodeScaling:
    """Coefficients of decode rounds of one group, from rounds of several sizes.

    What every request costs and what those of the largest mini-batch cost is told apart only where
    there are rounds of several masters; it is all put down to the latter.

    Args:
        works: what the group computed in each round.
        seconds: that each took.
    """
    most = [max(np.add(one.tokens, one.growth)) for one in works]
    terms = np.array([
        (1.0, max(one.mini_batches), tokens, len(one.mini_batches) > 1)
        for one, tokens in zip(works, most, strict=True)
    ], np.float64)  # fmt: skip
    base_s, request_s, token_s, exchange_s = _least_squares(terms / np.asarray(seconds)[:, None])
    return DecodeScaling(
        base_s=base_s, request_s=0.0, master_request_s=request_s, context_token_s=token_s,
        exchange_s=exchange_s,
    )  # fmt: skip


def _profiled_decode(cost: ElasticCost) -> DecodeScaling:
    """Of one instance: from an almost empty round, many requests, and much KV."""

    def round_s(requests: int, tokens: int) -> float:
        work = DecodeWork((requests,), (tokens,), (requests,))
        return float(cost.round_run_s([work], 1)[0])

    one_s, many_s, long_s = round_s(1, 0), round_s(65, 0), round_s(1, PROBES[-1])
    return DecodeScaling(
        base_s=one_s, request_s=0.0, master_request_s=max(many_s - one_s, 0.0) / 64,
        context_token_s=max(long_s - one_s, 0.0) / PROBES[-1],
    )  # fmt: skip


def _least_squares(terms: NDArray[np.float64]) -> list[float]:
    """Coefficients, none negative, that bring every row of terms near 1."""
    from scipy.optimize import nnls  # only whoever profiles waits for it

    scale = terms.max(axis=0)
    found = np.asarray(nnls(terms / scale, np.ones(len(terms)))[0] / scale, np.float64)
    return found.tolist()
