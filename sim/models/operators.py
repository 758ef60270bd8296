"""The matrix multiplications of a decoder, the one table that everything here counts from."""

from functools import lru_cache
from typing import NamedTuple

from sim.models.dimensions import Architecture


class Linear(NamedTuple):
    """One weight matrix, alike in `layers` layers. Matrices read together are one: q, k and v."""

    name: str
    inputs: int
    outputs: int
    layers: int
    has_bias: bool = False
    copies: int = 1
    """Matrices stored in a layer: above 1, one for each expert."""
    used: int = 1
    """Copies that one token goes through."""

    @property
    def parameters(self) -> int:
        """Elements of one copy, bias included."""
        return self.inputs * self.outputs + self.outputs * self.has_bias

    @property
    def stored_parameters(self) -> int:
        """Elements of every copy in every layer."""
        return self.layers * self.copies * self.parameters

    @property
    def flops_per_token(self) -> int:
        """Multiply-adds, counted as two, for one token in one layer. Adding the bias is not one."""
        return 2 * self.used * self.inputs * self.outputs


@lru_cache(maxsize=64)
def layer_linears(architecture: Architecture) -> tuple[Linear, ...]:
    """The matrices inside the layers, in the order in which a token meets them.

    `gate_up` is the single matrix into the MLP where there is no gate. Router and shared-expert
    gate are matrices as well. Kinds of layer that the architecture lacks are left out.
    """
    a = architecture
    attention = (
        Linear(
            "qkv_projection",
            a.hidden_size,
            a.query_size + 2 * a.kv_size,
            a.num_layers,
            a.qkv_bias,
        ),
        Linear(
            "output_projection",
            a.query_size,
            a.hidden_size,
            a.num_layers,
            a.attention_output_bias,
        ),
    )
    dense = _mlp(a, "", a.intermediate_size, a.num_dense_layers) if a.num_dense_layers else ()
    return attention + dense + (_experts(a) if a.sparse_layers else ())


@lru_cache(maxsize=64)
def lm_head(architecture: Architecture) -> Linear:
    """The projection to the vocabulary; where the two are tied it reads the token embedding."""
    return Linear("lm_head", architecture.hidden_size, architecture.vocab_size, 1)


def _experts(architecture: Architecture) -> tuple[Linear, ...]:
    a = architecture
    layers = a.num_sparse_layers
    router = Linear("router", a.hidden_size, a.num_experts, layers)
    routed = tuple(
        linear._replace(copies=a.num_experts, used=a.experts_per_token)
        for linear in _mlp(a, "expert_", a.moe_intermediate_size, layers)
    )
    if not a.shared_expert_intermediate_size:
        return (router, *routed)
    shared = _mlp(a, "shared_", a.shared_expert_intermediate_size, layers)
    return (router, *routed, *shared, Linear("shared_gate", a.hidden_size, 1, layers))


def _mlp(architecture: Architecture, prefix: str, width: int, layers: int) -> tuple[Linear, ...]:
    hidden, bias = architecture.hidden_size, architecture.mlp_bias
    ways_in = 2 if architecture.gated_mlp else 1
    return (
        Linear(f"{prefix}gate_up", hidden, ways_in * width, layers, bias),
        Linear(f"{prefix}down", width, hidden, layers, bias),
    )
