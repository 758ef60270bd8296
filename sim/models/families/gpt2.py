"""GPT-2: learned positions, biases everywhere, layer norms, one matrix into the MLP."""

from sim.models.config_file import ConfigFile
from sim.models.dimensions import Architecture
from sim.models.families.layout import even_share


def read_gpt2(name: str, config: ConfigFile) -> Architecture:
    """`n_inner`, where it is not written, is four times the hidden size."""
    if config.flag("add_cross_attention", False):
        raise ValueError("add_cross_attention=true is not modelled; only decoders are")
    hidden = config.integer("n_embd", "hidden_size")
    heads = config.integer("n_head", "num_attention_heads")
    inner = config.integer_or(None, "n_inner")
    return Architecture(
        name=name,
        family="gpt2",
        num_layers=config.integer("n_layer", "num_hidden_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=even_share(hidden, heads),
        intermediate_size=4 * hidden if inner is None else inner,
        vocab_size=config.integer("vocab_size"),
        max_position_embeddings=config.integer("n_positions", "max_position_embeddings"),
        tie_embeddings=config.flag("tie_word_embeddings", True),
        learned_positions=True,
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        gated_mlp=False,
        activation=config.text("activation_function", "gelu_new"),
        norm="layer",
        norm_bias=True,
        norm_eps=config.number_or("layer_norm_epsilon", 1e-5),
    )
