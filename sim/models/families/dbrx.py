"""DBRX: experts in every layer, layer norms without bias, settings nested by part."""

from sim.models.config_file import ConfigFile
from sim.models.dimensions import Architecture
from sim.models.families.layout import even_share, rope_theta


def read_dbrx(name: str, config: ConfigFile) -> Architecture:
    """Attention is described in `attn_config`, the experts in `ffn_config`."""
    if config.flag("tie_word_embeddings", False):
        raise ValueError("tie_word_embeddings=true does not exist for dbrx; set it to false")
    attention, experts = config.section("attn_config"), config.section("ffn_config")
    hidden = config.integer("d_model", "hidden_size")
    heads = config.integer("n_heads", "num_attention_heads")
    layers = config.integer("n_layers", "num_hidden_layers")
    width = experts.integer("ffn_hidden_size")
    return Architecture(
        name=name,
        family="dbrx",
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=attention.integer("kv_n_heads"),
        head_dim=even_share(hidden, heads),
        intermediate_size=width,
        vocab_size=config.integer("vocab_size"),
        max_position_embeddings=config.integer("max_seq_len", "max_position_embeddings"),
        rope_theta=attention.number_or("rope_theta", rope_theta(config)),
        activation=experts.section("ffn_act_fn").text("name", "silu"),
        norm="layer",
        norm_eps=1e-5,
        num_experts=experts.integer("moe_num_experts"),
        experts_per_token=experts.integer("moe_top_k"),
        # The order of the norm that they are divided by: 1 is their sum.
        renormalise_top_k=experts.number_or("moe_normalize_expert_weights", 1.0) == 1.0,
        moe_intermediate_size=width,
        sparse_layers=tuple(range(layers)),
    )
