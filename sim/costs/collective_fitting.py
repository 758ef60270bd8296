"""Alpha-beta parameters of a collective from measured payloads: Hockney's model of a message."""

# pyright: basic
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

TRAINING_BYTES = tuple(256 * 4**step for step in range(8))
"""Payloads that are fitted: 256 bytes to 4 MiB."""
HELDOUT_BYTES = tuple(512 * 4**step for step in range(7))
"""Payloads between them that judge the fit."""


class AlphaBeta(NamedTuple):
    """Seconds of a payload: latency_s + payload_bytes / bandwidth_bytes_per_s."""

    latency_s: float
    bandwidth_bytes_per_s: float

    def seconds(self, payload_bytes: float) -> float:
        """Seconds of one call."""
        return self.latency_s + payload_bytes / self.bandwidth_bytes_per_s


def fit_alpha_beta(payload_bytes: Sequence[float], seconds: Sequence[float]) -> AlphaBeta:
    """The parameters, neither below zero, with the least sum of squared relative errors.

    Raises:
        ValueError: fewer than two payloads, seconds that are not positive, or none that grow.
    """
    from scipy.optimize import nnls  # only whoever fits waits for it

    sizes, times = np.asarray(payload_bytes, float), np.asarray(seconds, float)
    if len(set(payload_bytes)) < 2 or len(sizes) != len(times):
        raise ValueError(
            f"{len(sizes)} payloads with {len(times)} times: give a time for each of at least two"
        )
    if not (np.isfinite(times) & (times > 0)).all():
        raise ValueError(f"seconds={list(seconds)} must be finite and above 0")
    unit = float(sizes.max())
    rows = np.stack([1.0 / times, sizes / unit / times], axis=1)
    latency_s, whole_s = nnls(rows, np.ones(len(times)))[0].tolist()
    if whole_s <= 0:
        raise ValueError(
            f"payloads up to {unit:.0f} bytes take no longer than small ones; measure larger ones"
        )
    return AlphaBeta(latency_s, unit / whole_s)
