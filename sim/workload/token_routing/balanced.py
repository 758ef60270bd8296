"""Every expert gets as many rows as another, to within one: for closed forms and upper bounds."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sim.workload.token_routing.base import TokenRouting, Tokens, require_top_k


@dataclass(kw_only=True)
class Balanced(TokenRouting):
    """Experts dealt out in turn to the tokens of a micro-batch, in each layer from expert 0.

    No rule that looks at each token alone can be exact in every batch. So this one goes by the
    place in the batch: a token may choose other experts in another batch.
    """

    def expert_ids(
        self, seed: int, layer: int, tokens: Tokens, num_experts: int, top_k: int
    ) -> NDArray[np.int32]:
        """Token i of the batch chooses i * top_k and those that follow, modulo num_experts."""
        require_top_k(num_experts, top_k)
        rows = np.arange(tokens.num_tokens * top_k, dtype=np.int64) % num_experts
        return rows.astype(np.int32).reshape(-1, top_k)

    def loads(
        self, seed: int, num_layers: int, num_experts: int, top_k: int
    ) -> NDArray[np.float64]:
        """All the same: what large batches come to."""
        require_top_k(num_experts, top_k)
        return np.full((num_layers, num_experts), 1 / num_experts)
