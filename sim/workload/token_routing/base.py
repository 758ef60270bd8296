"""The contract of a token routing: which experts of a mixture of experts each token chooses."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Tokens(NamedTuple):
    """Tokens of one micro-batch, in order: two columns of equal length."""

    request_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    """Of each token in its request, from 0."""

    @property
    def num_tokens(self) -> int:
        """How many these are; `len` counts the columns."""
        return len(self.request_ids)


@dataclass(kw_only=True)
class TokenRouting(ABC):
    """The gate of every layer, as far as a simulation needs it. It is its own Hydra schema.

    A choice depends on (seed, layer, request, position) alone, so that a token chooses the same
    experts in any batch and on both panels. `balanced` says how it departs from that.
    """

    @abstractmethod
    def expert_ids(
        self, seed: int, layer: int, tokens: Tokens, num_experts: int, top_k: int
    ) -> NDArray[np.int32]:
        """The logical experts that tokens choose in one layer.

        Args:
            seed: the scenario's seed, not negative.
            layer: counted from 0 among the layers that have experts.
            tokens: of one micro-batch. Not changed.
            num_experts: that each of them has.
            top_k: that a token chooses, at most num_experts.

        Returns:
            int32 [tokens, top_k], distinct in each row.

        Raises:
            ValueError: top_k is out of range, or a record lacks a token.
        """

    @abstractmethod
    def loads(
        self, seed: int, num_layers: int, num_experts: int, top_k: int
    ) -> NDArray[np.float64]:
        """The share of the rows (choices) that each expert is expected to get.

        Args:
            seed: the scenario's seed, not negative.
            num_layers: that have experts.
            num_experts: that each of them has.
            top_k: that a token chooses, at most num_experts.

        Returns:
            float64 [layers, experts]; each layer adds up to 1.
        """


def checked_expert_ids(
    routing: TokenRouting, seed: int, layer: int, tokens: Tokens, num_experts: int, top_k: int
) -> NDArray[np.int32]:
    """What a routing chooses, for both panels.

    Raises:
        ValueError: the shape is wrong, an expert does not exist, or is chosen twice by a token.
    """
    found = routing.expert_ids(seed, layer, tokens, num_experts, top_k)
    name = f"token_routing {type(routing).__name__}"
    shape = (tokens.num_tokens, top_k)
    if found.shape != shape or found.dtype.kind != "i":
        raise ValueError(
            f"{name} gives {found.dtype} {found.shape} and must give int32 [tokens, top_k] = "
            f"{shape}; mend the routing"
        )
    ranked = np.sort(found, axis=1)
    wrong = (ranked[:, 1:] == ranked[:, :-1]).any(axis=1)
    wrong |= (ranked[:, 0] < 0) | (ranked[:, -1] >= num_experts)
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"{name} sends request {tokens.request_ids[at]}, position {tokens.positions[at]} of "
            f"layer {layer} to experts {found[at].tolist()}; they must be distinct and from 0 to "
            f"{num_experts - 1}; mend the routing"
        )
    return found


def require_top_k(num_experts: int, top_k: int) -> None:
    """Refuse a token that chooses no expert, or more than there are.

    Raises:
        ValueError: top_k is out of range.
    """
    if not 1 <= top_k <= num_experts:
        raise ValueError(
            f"top_k={top_k} must be from 1 to num_experts={num_experts}; take both from the model"
        )
