# pyright: basic
"""What profiling a cost tells a plan of elastic instances. scipy comes without complete types."""

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
        lengths = np.array(PROBES, np.float64)
        terms = np.stack([np.ones_like(lengths), lengths, lengths**2], 1) / seconds[:, None]
        base_s, token_s, square_s = _least_squares(terms)
        if prefill:
            token_s, square_s = (
                min(token_s, prefill[-1].token_s),
                min(square_s, prefill[-1].square_s),
            )
        prefill.append(PrefillScaling(base_s=max(base_s, 1e-9), token_s=token_s, square_s=square_s))
    return ScalingBase(
        name="profiled", model=model, device="as the scenario's",
        prefill=prefill, decode=_profiled_decode(cost),
        source="fitted to the scenario's own cost",
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


def _least_squares(terms: NDArray[np.float64]) -> tuple[float, float, float]:
    """Coefficients, none negative, that bring every row of terms near 1."""
    from scipy.optimize import nnls  # only whoever profiles waits for it

    scale = terms.max(axis=0)
    found = np.asarray(nnls(terms / scale, np.ones(len(terms)))[0] / scale, np.float64)
    base, token, square = found.tolist()
    return base, token, square
