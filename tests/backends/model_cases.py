"""Tiny models of every family, as transformers writes and runs them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from backends.forward_batch import Chunk, ForwardBatch
from backends.kv_cache import PagedKVCache
from backends.transformer import Transformer
from backends.weights import load_model

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
}
EXPERT_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "mixtral_all_chosen": ("Mixtral", {"num_local_experts": 3, "num_experts_per_tok": 3}),
    "mixtral_one_expert_tied": (
        "Mixtral",
        {"num_local_experts": 1, "num_experts_per_tok": 1, "tie_word_embeddings": True},
    ),
    "qwen3_moe": ("Qwen3Moe", EXPERTS | {"head_dim": 16, "norm_topk_prob": True}),
    "qwen3_moe_every_other": (
        "Qwen3Moe",
        EXPERTS | {"head_dim": 8, "norm_topk_prob": False, "decoder_sparse_step": 2},
    ),
    "qwen2_moe": ("Qwen2Moe", EXPERTS | {"shared_expert_intermediate_size": 56}),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_biased_stretched": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3_ROPE},
    ),
    "llama_tied": ("Llama", {"tie_word_embeddings": True, "head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"rms_norm_eps": 1e-5}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
} | EXPERT_CASES


def reference_model(case: str) -> Any:
    """A model of random weights, biases and norms included, in evaluation mode."""
    family, extra = CASES[case]
    config = getattr(transformers, f"{family}Config")(**(SIZES | extra))
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def save_and_load(model: Any, folder: Path) -> Transformer:
    """The same model through its files."""
    model.save_pretrained(folder)
    loaded = load_model(folder)
    return Transformer(loaded.config, loaded.weights)


def reference_logits(model: Any, tokens: Sequence[int]) -> Tensor:
    """Logits [tokens, vocab] of one sequence."""
    with torch.no_grad():
        return model(torch.tensor([list(tokens)])).logits[0]


def run(model: Transformer, cache: PagedKVCache, chunks: Sequence[Chunk]) -> Tensor:
    """Logits of one forward pass, with blocks allocated for it."""
    for chunk in chunks:
        cache.allocate(chunk.request_id, chunk.start + len(chunk.token_ids))
    return model.forward(ForwardBatch.build(cache, chunks), cache)
