"""Qwen 1.5 to 3, dense (qwen2, qwen3) and with experts (qwen2_moe, qwen3_moe)."""

from sim.models.config_file import ConfigFile
from sim.models.dimensions import Architecture
from sim.models.families.layout import Features, read_layout


def read_qwen2(name: str, config: ConfigFile) -> Architecture:
    """Qwen 1.5 to 2.5: queries, keys and values have a bias, nothing else has."""
    _refuse_partial_window(config)
    kv_heads = config.integer("num_key_value_heads")
    return read_layout(name, "qwen2", config, kv_heads, {"qkv_bias": True})


def read_qwen3(name: str, config: ConfigFile) -> Architecture:
    """Queries and keys are normalised. The head size must be written, it is never a share."""
    _refuse_partial_window(config)
    config.integer("head_dim")
    kv_heads = config.integer("num_key_value_heads")
    return read_layout(name, "qwen3", config, kv_heads, _third_generation(config))


def read_qwen2_moe(name: str, config: ConfigFile) -> Architecture:
    """Every token also takes a shared expert."""
    _refuse_partial_window(config)
    features = _experts(config)
    features["qkv_bias"] = config.flag("qkv_bias", True)
    if "num_experts" in features:
        shared = config.integer("shared_expert_intermediate_size")
        if shared < 1:
            raise ValueError(f"shared_expert_intermediate_size={shared} must be at least 1")
        features["shared_expert_intermediate_size"] = shared
    return read_layout(name, "qwen2_moe", config, config.integer("num_key_value_heads"), features)


def read_qwen3_moe(name: str, config: ConfigFile) -> Architecture:
    """No shared expert. A window, where there is one, holds in every layer."""
    features = _third_generation(config) | _experts(config)
    if config.flag("use_sliding_window", False):
        features["sliding_window"] = config.integer("sliding_window")
    return read_layout(name, "qwen3_moe", config, config.integer("num_key_value_heads"), features)


def _third_generation(config: ConfigFile) -> Features:
    bias = config.flag("attention_bias", False)
    return {"qkv_bias": bias, "attention_output_bias": bias, "qk_norm": True}


def _experts(config: ConfigFile) -> Features:
    """Which layers have experts, and which; nothing when all layers are dense."""
    step = 1 if not config.has("decoder_sparse_step") else config.integer("decoder_sparse_step")
    if step < 1:
        raise ValueError(f"decoder_sparse_step={step} must be at least 1")
    dense = set(config.integers("mlp_only_layers"))
    num_experts = config.integer("num_experts", "num_local_experts")
    sparse = tuple(
        layer
        for layer in range(config.integer("num_hidden_layers"))
        if num_experts > 0 and layer not in dense and (layer + 1) % step == 0
    )
    if not sparse:
        return {}
    return {
        "num_experts": num_experts,
        "experts_per_token": config.integer("num_experts_per_tok"),
        "renormalise_top_k": config.flag("norm_topk_prob", False),
        "moe_intermediate_size": config.integer("moe_intermediate_size"),
        "sparse_layers": sparse,
    }


def _refuse_partial_window(config: ConfigFile) -> None:
    if config.flag("use_sliding_window", False):
        raise ValueError(
            "use_sliding_window=true gives a window to some layers only, which is not modelled; "
            "set it to false for an upper bound on the attention"
        )
