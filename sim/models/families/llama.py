"""Llama 1 to 3, and the many models that share their layout."""

from sim.models.config_file import ConfigFile
from sim.models.dimensions import Architecture
from sim.models.families.layout import Features, read_layout


def read_llama(name: str, config: ConfigFile) -> Architecture:
    """Without `num_key_value_heads`, as in Llama 1, every head has keys of its own."""
    heads = config.integer("num_attention_heads")
    kv_heads = config.integer_or(None, "num_key_value_heads")
    bias = config.flag("attention_bias", False)
    features: Features = {
        "qkv_bias": bias,
        "attention_output_bias": bias,
        "mlp_bias": config.flag("mlp_bias", False),
    }
    return read_layout(name, "llama", config, heads if kv_heads is None else kv_heads, features)
