"""Mistral, dense (mistral) and with experts in every layer (mixtral). Neither has a bias."""

from sim.models.config_file import ConfigFile
from sim.models.dimensions import Architecture
from sim.models.families.layout import Features, read_layout, rope_theta


def read_mistral(name: str, config: ConfigFile) -> Architecture:
    """The window must be written, as null for none: its absence means 4096 to transformers."""
    if not config.has("sliding_window"):
        raise ValueError("sliding_window is missing; give the window in tokens, or null for none")
    features: Features = {"sliding_window": config.integer_or(None, "sliding_window")}
    return read_layout(name, "mistral", config, config.integer("num_key_value_heads"), features)


def read_mixtral(name: str, config: ConfigFile) -> Architecture:
    """`intermediate_size` is the width of one expert."""
    features: Features = {
        "rope_theta": rope_theta(config, 1e6),
        "norm_eps": config.number_or("rms_norm_eps", 1e-5),
        "sliding_window": config.integer_or(None, "sliding_window"),
        "num_experts": config.integer("num_local_experts", "num_experts"),
        "experts_per_token": config.integer("num_experts_per_tok"),
        "renormalise_top_k": True,
        "moe_intermediate_size": config.integer("intermediate_size"),
        "sparse_layers": tuple(range(config.integer("num_hidden_layers"))),
    }
    return read_layout(name, "mixtral", config, config.integer("num_key_value_heads"), features)
