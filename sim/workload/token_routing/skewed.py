"""Some experts are hotter than others: popularity that falls with a power of the rank (Zipf)."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sim.seeding import generator
from sim.workload.checks import require_not_negative
from sim.workload.token_routing.base import TokenRouting, Tokens, require_top_k
from sim.workload.token_routing.draws import distinct, token_keys
from sim.workload.token_routing.inclusion import inclusion_probabilities

GRAINS = 2**40
"""What the weights of all experts add up to, about; the least popular expert has one grain."""


@dataclass(kw_only=True)
class Skewed(TokenRouting):
    """Distinct experts drawn by popularity; which expert is how popular differs by layer.

    A token draws its first expert with probability (rank + 1)**-skew over the sum, its next one so
    among the others, and so on. A hot expert is chosen once by a token, so loads are less skewed
    than popularity: `loads` gives the true shares.
    """

    skew: float = 1.0
    """Exponent of the popularity; 0: all the same. At 1 the most popular of 64 experts gets a
    fifth of the first choices."""

    def __post_init__(self) -> None:
        """Refuses a popularity that grows with the rank."""
        require_not_negative("skew", self.skew)

    def expert_ids(
        self, seed: int, layer: int, tokens: Tokens, num_experts: int, top_k: int
    ) -> NDArray[np.int32]:
        """In the order in which they are drawn."""
        require_top_k(num_experts, top_k)
        keys = token_keys(seed, layer, tokens)
        ranks = distinct(keys, _weights(num_experts, self.skew), top_k)
        return _by_popularity(seed, layer, num_experts)[ranks]

    def loads(
        self, seed: int, num_layers: int, num_experts: int, top_k: int
    ) -> NDArray[np.float64]:
        """Probability of being among the top_k draws, over top_k."""
        require_top_k(num_experts, top_k)
        found = np.empty((num_layers, num_experts))
        shares = _shares(num_experts, self.skew, top_k)
        for layer, row in enumerate(found):
            row[_by_popularity(seed, layer, num_experts)] = shares
        return found


@lru_cache(maxsize=16)
def _weights(num_experts: int, skew: float) -> NDArray[np.int64]:
    """Popularity by rank in whole grains."""
    weights = np.arange(1, num_experts + 1, dtype=np.float64) ** -skew
    return np.maximum(1, np.rint(weights * (GRAINS / weights.sum()))).astype(np.int64)


@lru_cache(maxsize=16)
def _shares(num_experts: int, skew: float, top_k: int) -> NDArray[np.float64]:
    """Share of the rows by rank."""
    found = inclusion_probabilities(_weights(num_experts, skew).astype(np.float64), top_k)
    return found / found.sum()


@lru_cache(maxsize=1024)
def _by_popularity(seed: int, layer: int, num_experts: int) -> NDArray[np.int32]:
    """The experts of a layer, the most popular one first."""
    order = generator(seed, f"token_routing/{layer}").permutation(num_experts)
    return order.astype(np.int32)
