"""Every expert as likely as another: a router that training has balanced."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sim.workload.token_routing.base import TokenRouting, Tokens, require_top_k
from sim.workload.token_routing.draws import distinct_evenly, token_keys


@dataclass(kw_only=True)
class Uniform(TokenRouting):
    """Distinct experts drawn at random for every token, all as likely."""

    def expert_ids(
        self, seed: int, layer: int, tokens: Tokens, num_experts: int, top_k: int
    ) -> NDArray[np.int32]:
        """In a random order."""
        require_top_k(num_experts, top_k)
        return distinct_evenly(token_keys(seed, layer, tokens), num_experts, top_k)

    def loads(
        self, seed: int, num_layers: int, num_experts: int, top_k: int
    ) -> NDArray[np.float64]:
        """All the same."""
        require_top_k(num_experts, top_k)
        return np.full((num_layers, num_experts), 1 / num_experts)
