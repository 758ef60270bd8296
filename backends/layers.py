"""One layer of a decoder, as the two halves that it divides into: attention, and MLP or experts."""

from __future__ import annotations

import torch
from torch import Tensor

from backends.experts import Mixture
from backends.kernels.paged import KvCache
from backends.linear import Linear
from backends.mlp import Mlp
from backends.operators import Operators
from backends.peers import Peers
from backends.placing import Placer
from sim.models.architecture import Architecture


class Layer:
    """One layer; what comes out is not yet added to the residual, the next norm does that."""

    def __init__(
        self,
        config: Architecture,
        place: Placer,
        number: int,
        peers: Peers,
        with_experts: bool = True,
    ) -> None:
        """Take layer `number` of the weights; without its experts only `attend` can be called."""
        prefix = f"model.layers.{number}."
        attention = f"{prefix}self_attn."
        self._peers = peers
        self._head_dim = config.head_dim
        self._num_heads, self._num_kv_heads = config.num_heads, config.num_kv_heads
        self._input_norm = place(f"{prefix}input_layernorm.weight")
        self._mlp_norm = place(f"{prefix}post_attention_layernorm.weight")
        self._qkv = place.linear(*(f"{attention}{part}_proj" for part in "qkv"))
        self._output = place.linear(f"{attention}o_proj")
        self.mlp: Mlp | Mixture = (
            place.mixture(config, number, with_experts)
            if number in config.sparse_layers
            else place.mlp(f"{prefix}mlp.")
        )
        """What the other half computes, on one rank; a sparse layer's has a gate and experts."""
        self._qk_norm: tuple[Tensor, Tensor] | None = None
        if config.qk_norm:
            norms = (place(f"{attention}{part}_norm.weight") for part in "qk")
            self._qk_norm = (next(norms), next(norms))

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Its matrix products that every token goes through."""
        return self._qkv, self._output, *self.mlp.linears

    def __call__(
        self, x: Tensor, residual: Tensor, cache: KvCache, operators: Operators
    ) -> tuple[Tensor, Tensor]:
        """Both halves: (x, residual) of the next layer from those of this one, [tokens, hidden]."""
        normed, residual = self.attend(x, residual, cache, operators)
        return self.feed_forward(normed), residual

    def attend(
        self, x: Tensor, residual: Tensor, cache: KvCache, operators: Operators
    ) -> tuple[Tensor, Tensor]:
        """The attention half, up to and including the norm before the MLP.

        Args:
            x: [tokens, hidden], what the layer before made, or the embedding.
            residual: [tokens, hidden], the sum that `x` is not yet in.
            cache: of this layer, changed.
            operators: of this pass.

        Returns:
            What `feed_forward` takes, and the residual beside it, both [tokens, hidden].
        """
        normed, residual = operators.add_norm(x, residual, self._input_norm)
        heads = self._qkv(normed).view(len(x), -1, self._head_dim)
        if self._qk_norm is not None:
            heads = self._normalise(heads, self._qk_norm, operators)
        query = operators.turn_and_store(heads, cache)
        attended = operators.attend(query, cache)
        x = self._peers.add(self._output(attended.reshape(len(x), -1)), "attention_output")
        return operators.add_norm(x, residual, self._mlp_norm)

    def feed_forward(self, normed: Tensor) -> Tensor:
        """The other half, MLP or experts: the next layer's `x` [tokens, hidden]."""
        return self._peers.add(self.mlp(normed), "mlp_output")

    def _normalise(
        self, heads: Tensor, weights: tuple[Tensor, Tensor], operators: Operators
    ) -> Tensor:
        sizes = [self._num_heads, self._num_kv_heads, self._num_kv_heads]
        query, key, value = heads.split(sizes, 1)
        normed = (operators.norm(query, weights[0]), operators.norm(key, weights[1]))
        return torch.cat((*normed, value), 1)
