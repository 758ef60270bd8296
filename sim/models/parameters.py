"""How many parameters an architecture has, and what they and its KV cache weigh.

The counts are those of transformers' own module for the same config.json, to the last element;
parameters that two modules share count once.
"""

from sim.models.dimensions import Architecture
from sim.models.operators import layer_linears, lm_head


def parameter_counts(architecture: Architecture) -> dict[str, int]:
    """Elements by operator, summed over layers and experts.

    `embedding` holds the learned positions too; a tied `lm_head` has 0 of its own.
    """
    a = architecture
    rows = a.vocab_size + (a.max_position_embeddings if a.learned_positions else 0)
    counts = {"embedding": rows * a.hidden_size}
    counts |= {linear.name: linear.stored_parameters for linear in layer_linears(a)}
    counts["norms"] = _norm_parameters(a)
    counts["lm_head"] = 0 if a.tie_embeddings else lm_head(a).stored_parameters
    return counts


def total_parameters(architecture: Architecture) -> int:
    """Elements of all weights, shared ones once."""
    return sum(parameter_counts(architecture).values())


def active_parameters(architecture: Architecture) -> int:
    """Elements of the weights that one token meets: all but the experts it is not sent to.

    As model cards count it: embedding and lm_head are in it whole.
    """
    idle = sum(
        linear.layers * (linear.copies - linear.used) * linear.parameters
        for linear in layer_linears(architecture)
    )
    return total_parameters(architecture) - idle


def weight_bytes(architecture: Architecture, dtype_bytes: float) -> float:
    """Bytes of all weights at `dtype_bytes` an element; 0.5 stands for four bits."""
    return total_parameters(architecture) * dtype_bytes


def kv_bytes_per_token(architecture: Architecture, kv_dtype_bytes: int) -> int:
    """Bytes that one token keeps in the KV cache: keys and values of every layer."""
    return 2 * architecture.num_layers * architecture.kv_size * kv_dtype_bytes


def _norm_parameters(architecture: Architecture) -> int:
    a = architecture
    per_norm = a.hidden_size * (2 if a.norm_bias else 1)
    on_heads = 2 * a.head_dim * a.num_layers if a.qk_norm else 0
    # Two a layer and one before the lm_head.
    return (2 * a.num_layers + 1) * per_norm + on_heads
