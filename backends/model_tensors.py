"""The tensors of a model: their names and shapes here, and how experts are named in checkpoints.

Here all experts of a layer lie in two tensors, as transformers 5 holds them in memory. Published
checkpoints, and those that `save_pretrained` writes, have a tensor for each matrix of each expert.
"""

from __future__ import annotations

from typing import NamedTuple

from sim.models.architecture import Architecture

Shape = tuple[int, ...]


class Single(NamedTuple):
    """The name of one tensor among those that make up a larger one, and its shape."""

    name: str
    shape: Shape


def gate_name(layer: int) -> str:
    """The tensor [experts, hidden] that routes the tokens of a layer."""
    return f"model.layers.{layer}.mlp.gate.weight"


def gate_up_name(layer: int) -> str:
    """The tensor [experts, 2 * inner, hidden] of a layer: of each expert gate, then up."""
    return f"model.layers.{layer}.mlp.experts.gate_up_proj"


def down_name(layer: int) -> str:
    """The tensor [experts, hidden, inner] of a layer."""
    return f"model.layers.{layer}.mlp.experts.down_proj"


def expected_shapes(architecture: Architecture) -> dict[str, Shape]:
    """Shape of each tensor of a model of `architecture`, by its usual name."""
    hidden = architecture.hidden_size
    shapes: dict[str, Shape] = {
        "model.embed_tokens.weight": (architecture.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not architecture.tie_embeddings:
        shapes["lm_head.weight"] = (architecture.vocab_size, hidden)
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if architecture.qk_norm:
        head_dim = architecture.head_dim
        norms |= {"self_attn.q_norm": head_dim, "self_attn.k_norm": head_dim}
    for layer in range(architecture.num_layers):
        sparse = layer in architecture.sparse_layers
        linears = _attention(architecture) | ({} if sparse else _mlp(architecture))
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}{name}.weight": (size,) for name, size in norms.items()}
        for name, (rows, columns, bias) in linears.items():
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
        if sparse:
            shapes |= _experts(architecture, layer)
    return shapes


def published_singles(architecture: Architecture) -> dict[str, list[list[Single]]]:
    """Of the tensors that checkpoints hold in other pieces: those pieces, expert by expert.

    The pieces of one expert lie one above the other. One piece alone may be the whole tensor under
    another name.
    """
    block, gate, up, down = (
        ("block_sparse_moe", "w1", "w3", "w2")
        if architecture.family == "mixtral"
        else ("mlp", "gate_proj", "up_proj", "down_proj")
    )
    hidden, inner = architecture.hidden_size, architecture.moe_intermediate_size
    singles: dict[str, list[list[Single]]] = {}
    for layer in architecture.sparse_layers:
        prefix = f"model.layers.{layer}.{block}."
        if block != "mlp":
            router = Single(f"{prefix}gate.weight", (architecture.num_experts, hidden))
            singles[gate_name(layer)] = [[router]]
        experts = [f"{prefix}experts.{expert}." for expert in range(architecture.num_experts)]
        singles[gate_up_name(layer)] = [
            [Single(f"{expert}{part}.weight", (inner, hidden)) for part in (gate, up)]
            for expert in experts
        ]
        singles[down_name(layer)] = [
            [Single(f"{expert}{down}.weight", (hidden, inner))] for expert in experts
        ]
    return singles


def _attention(architecture: Architecture) -> dict[str, tuple[int, int, bool]]:
    """Rows, columns and bias of its linear layers."""
    hidden, query, kv = architecture.hidden_size, architecture.query_size, architecture.kv_size
    return {
        "self_attn.q_proj": (query, hidden, architecture.qkv_bias),
        "self_attn.k_proj": (kv, hidden, architecture.qkv_bias),
        "self_attn.v_proj": (kv, hidden, architecture.qkv_bias),
        "self_attn.o_proj": (hidden, query, architecture.attention_output_bias),
    }


def _mlp(architecture: Architecture) -> dict[str, tuple[int, int, bool]]:
    hidden, inner = architecture.hidden_size, architecture.intermediate_size
    return {
        "mlp.gate_proj": (inner, hidden, architecture.mlp_bias),
        "mlp.up_proj": (inner, hidden, architecture.mlp_bias),
        "mlp.down_proj": (hidden, inner, architecture.mlp_bias),
    }


def _experts(architecture: Architecture, layer: int) -> dict[str, Shape]:
    experts, hidden = architecture.num_experts, architecture.hidden_size
    inner, shared = (
        architecture.moe_intermediate_size,
        architecture.shared_expert_intermediate_size,
    )
    shapes: dict[str, Shape] = {
        gate_name(layer): (experts, hidden),
        gate_up_name(layer): (experts, 2 * inner, hidden),
        down_name(layer): (experts, hidden, inner),
    }
    if shared:
        prefix = f"model.layers.{layer}.mlp.shared_expert"
        shapes |= {
            f"{prefix}.gate_proj.weight": (shared, hidden),
            f"{prefix}.up_proj.weight": (shared, hidden),
            f"{prefix}.down_proj.weight": (hidden, shared),
            f"{prefix}_gate.weight": (1, hidden),
        }
    return shapes
