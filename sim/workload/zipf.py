# pyright: basic
"""Popularity that falls with a power of the rank (Zipf), fitted to what its head draws.

RAGCache (TOCS 2025) states the head only, for MMLU: 3 % of the documents get 60 % of the requests.
scipy comes without complete types.
"""

from functools import lru_cache
from typing import cast

import numpy as np
from numpy.typing import NDArray


@lru_cache(maxsize=32)
def zipf_exponent(num_items: int, share: float, requests: float) -> float:
    """The exponent a of weights rank**-a for which the most popular items get so much.

    The sums are finite and exact: no item lies beyond `num_items`. Where the head ends within an
    item, that item counts in part.

    Args:
        num_items: how many items there are.
        share: of the items, the most popular ones (between 0 and 1).
        requests: of all requests, what they get; equal to `share` is uniform, exponent 0.

    Raises:
        ValueError: no falling popularity gives the head so little, or none so much.
    """
    if requests == share and 0 < share <= 1:
        return 0.0
    if not 0 < share < requests < 1:
        raise ValueError(
            f"popular_share={share} and popular_requests={requests} must be above 0 and below 1, "
            "and the requests not below the share; try popular_share=0.03 popular_requests=0.6, or "
            "two equal numbers for documents that are all as popular"
        )
    if share * num_items < 1:
        raise ValueError(
            f"popular_share={share} of num_documents={num_items} must be one document at least; "
            f"try popular_share={1 / num_items:.3g}"
        )
    from scipy.optimize import brentq  # only whoever fits waits for it

    log_ranks = np.log(np.arange(1, num_items + 1))

    def missing(exponent: float) -> float:
        return requests - _head(np.exp(-exponent * log_ranks), share)

    most = 1.0
    while missing(most) > 0:
        most *= 2
    return cast(float, brentq(missing, 0.0, most, xtol=1e-12))


def _head(weights: NDArray[np.float64], share: float) -> float:
    """What the first `share` of the weights add up to, over the sum of all."""
    whole, part = divmod(share * len(weights), 1.0)
    end = int(whole)
    beyond = part * float(weights[end]) if end < len(weights) else 0.0
    return (float(weights[:end].sum()) + beyond) / float(weights.sum())


class Zipf:
    """Ranks by popularity: rank 0 is the most popular.

    Args:
        num_items: how many ranks there are.
        exponent: of the weights (rank + 1)**-exponent; 0: all the same.
    """

    def __init__(self, num_items: int, exponent: float) -> None:
        weights = np.arange(1, num_items + 1, dtype=np.float64) ** -exponent
        self._up_to = np.add.accumulate(weights)
        self._up_to /= self._up_to[-1]

    def ranks(self, uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
        """The ranks that uniform numbers stand for, in the same shape: the inverse of the CDF.

        Args:
            uniforms: numbers from 0 to below 1, of any shape.
        """
        return np.searchsorted(self._up_to, uniforms, side="right").astype(np.int64)
