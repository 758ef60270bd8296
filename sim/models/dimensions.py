"""The record that everything in this folder computes from: the sizes of one decoder."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What costs need to know of a decoder-only transformer. Sizes count elements, not bytes."""

    name: str
    family: str
    """The `model_type` of its config.json."""
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    """Width of the MLP of a dense layer. Without dense layers it is that of one expert."""
    vocab_size: int
    max_position_embeddings: int
    """The longest context, prompt and answer together, in tokens."""
    tie_embeddings: bool = False
    """The lm_head is the token embedding: stored once, still a matmul of its own."""
    learned_positions: bool = False
    """Positions are a table of `max_position_embeddings` rows instead of a rotation."""
    rope_theta: float | None = None
    """Base of the rotary embedding. None exactly when positions are learned."""
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """Queries and keys are normalised, one weight per element of a head."""
    gated_mlp: bool = True
    """Two matrices in (gate and up) instead of one."""
    activation: str = "silu"
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False
    norm_eps: float = 1e-6
    sliding_window: int | None = None
    """Keys that a query sees, itself included, in every layer. None: all before it."""
    num_experts: int = 0
    experts_per_token: int = 0
    renormalise_top_k: bool = False
    """The weights of a token's experts are divided by their sum, so that they add up to one."""
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    """Width of the expert that every token takes, behind a gate of its own. 0: there is none."""
    sparse_layers: tuple[int, ...] = ()
    """Which layers have experts in place of the MLP, counted from 0."""

    def __post_init__(self) -> None:
        _check_sizes(self)
        _check_experts(self)

    @property
    def query_size(self) -> int:
        """Elements of one token's queries in one layer, and of what attention returns for it."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Elements of one token's keys in one layer; its values are as many."""
        return self.num_kv_heads * self.head_dim

    @property
    def num_sparse_layers(self) -> int:
        """Layers with experts."""
        return len(self.sparse_layers)

    @property
    def num_dense_layers(self) -> int:
        """Layers with an ordinary MLP."""
        return self.num_layers - len(self.sparse_layers)


_POSITIVE = (
    "num_layers",
    "hidden_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)


def _check_sizes(architecture: Architecture) -> None:
    for field in _POSITIVE:
        value = getattr(architecture, field)
        if value < 1:
            raise ValueError(f"{field}={value} must be at least 1")
    heads, kv_heads = architecture.num_heads, architecture.num_kv_heads
    if heads % kv_heads:
        raise ValueError(
            f"num_kv_heads={kv_heads} must divide num_heads={heads}: each serves as many queries"
        )
    window = architecture.sliding_window
    if window is not None and window < 1:
        raise ValueError(f"sliding_window={window} must be at least 1, or null for none")
    if architecture.learned_positions != (architecture.rope_theta is None):
        raise ValueError(
            f"rope_theta={architecture.rope_theta} with learned_positions="
            f"{architecture.learned_positions}; give a decoder one of the two"
        )
    if not architecture.learned_positions and architecture.head_dim % 2:
        raise ValueError(
            f"head_dim={architecture.head_dim} must be even: rotary positions turn pairs"
        )


def _check_experts(architecture: Architecture) -> None:
    experts, chosen = architecture.num_experts, architecture.experts_per_token
    sparse = architecture.sparse_layers
    if not sparse:
        if experts:
            raise ValueError(f"num_experts={experts} but no layer has them; name the sparse_layers")
        return
    if any(not 0 <= layer < architecture.num_layers for layer in sparse) or len(set(sparse)) != len(
        sparse
    ):
        raise ValueError(
            f"sparse_layers={sparse} must be distinct layers of 0 to {architecture.num_layers - 1}"
        )
    if not 1 <= chosen <= experts:
        raise ValueError(f"experts_per_token={chosen} must lie in 1 to num_experts={experts}")
    if architecture.moe_intermediate_size < 1:
        raise ValueError(
            f"moe_intermediate_size={architecture.moe_intermediate_size} must be at least 1"
        )
    if architecture.shared_expert_intermediate_size < 0:
        raise ValueError(
            f"shared_expert_intermediate_size={architecture.shared_expert_intermediate_size} "
            "must not be negative; 0 means none"
        )
