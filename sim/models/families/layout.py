"""The layout of config.json that llama, mistral, mixtral and every qwen share.

A key that transformers would fill in with the size of some published model is required; only
defaults that hold for the whole family are taken over.
"""

from typing import TypedDict

from sim.models.config_file import ConfigFile
from sim.models.dimensions import Architecture


class Features(TypedDict, total=False):
    """What a family adds to the plain layout; the fields of `Architecture` of the same names."""

    rope_theta: float
    norm_eps: float
    qkv_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None
    num_experts: int
    experts_per_token: int
    renormalise_top_k: bool
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    sparse_layers: tuple[int, ...]


def read_layout(
    name: str, family: str, config: ConfigFile, num_kv_heads: int, features: Features
) -> Architecture:
    """The architecture that `config` describes, with what its family adds."""
    usual: Features = {
        "rope_theta": rope_theta(config),
        "norm_eps": config.number_or("rms_norm_eps", 1e-6),
    }
    return Architecture(
        name=name,
        family=family,
        num_layers=config.integer("num_hidden_layers"),
        hidden_size=config.integer("hidden_size"),
        num_heads=config.integer("num_attention_heads"),
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(config),
        intermediate_size=config.integer("intermediate_size"),
        vocab_size=config.integer("vocab_size"),
        max_position_embeddings=config.integer("max_position_embeddings"),
        tie_embeddings=config.flag("tie_word_embeddings", False),
        activation=config.text("hidden_act", "silu"),
        **(usual | features),
    )


def _head_dim(config: ConfigFile) -> int:
    """The head size where it is written, else the share of the hidden size that a head gets."""
    written = config.integer_or(None, "head_dim")
    if written is not None:
        return written
    return even_share(config.integer("hidden_size"), config.integer("num_attention_heads"))


def even_share(hidden_size: int, num_heads: int) -> int:
    """Elements of one head when the heads share the hidden size."""
    if num_heads < 1 or hidden_size % num_heads:
        raise ValueError(
            f"hidden_size={hidden_size} must be a multiple of the number of heads={num_heads}; "
            "change one, or write head_dim where the family has it"
        )
    return hidden_size // num_heads


def rope_theta(config: ConfigFile, default: float = 1e4) -> float:
    """The rotary base: newer files keep it in `rope_parameters`, older ones at the top."""
    top_level = config.number_or("rope_theta", default)
    return config.section("rope_parameters").number_or("rope_theta", top_level)
