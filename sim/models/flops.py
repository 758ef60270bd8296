"""FLOPs of one forward pass: as a counter sees it, and as a causal kernel does it.

Both count matrix multiplications alone, two FLOPs a multiply-add: projections, MLPs, routers,
scores, weighted values, lm_head. Norms, activations, rotary positions, softmax and additions, the
bias's included, are not counted.
"""

from sim.models.dimensions import Architecture
from sim.models.operators import layer_linears, lm_head


def matmul_flops(architecture: Architecture, batch: int, sequence: int) -> int:
    """FLOPs of a forward pass as transformers runs it: all S x S scores, lm_head at every position.

    Equal to torch's `FlopCounterMode` over transformers' eager attention and eager experts. A mask
    (causal, or a sliding window) saves nothing there. Each token goes through the same number of
    experts, so the total does not depend on the routing.

    Args:
        architecture: whose forward pass.
        batch: sequences, at least 1.
        sequence: tokens of each, at least 1, without any cached before.
    """
    if batch < 1 or sequence < 1:
        raise ValueError(f"batch={batch} and sequence={sequence} must both be at least 1")
    tokens, pairs = batch * sequence, batch * sequence * sequence
    return (
        tokens * layer_flops_per_token(architecture)
        + pairs * architecture.num_layers * attention_flops_per_pair(architecture)
        + tokens * lm_head(architecture).flops_per_token
    )


def causal_flops(
    architecture: Architecture, chunk_tokens: int, context_before: int = 0, sampled_tokens: int = 1
) -> int:
    """FLOPs of computing a chunk of one request when nothing masked is computed.

    A query meets the keys before it and its own, at most a sliding window of them; the lm_head
    sees only what is sampled. This is the number that costs are based on.

    Args:
        architecture: whose forward pass.
        chunk_tokens: tokens to compute, at least 1; 1 is a decode step.
        context_before: tokens of the request whose keys are cached already.
        sampled_tokens: positions that go through the lm_head; 0 for a chunk that is not the last.
    """
    if not 0 <= sampled_tokens <= chunk_tokens:
        raise ValueError(
            f"sampled_tokens={sampled_tokens} must lie in 0 to chunk_tokens={chunk_tokens}"
        )
    pairs = causal_pairs(chunk_tokens, context_before, architecture.sliding_window)
    return (
        chunk_tokens * layer_flops_per_token(architecture)
        + pairs * architecture.num_layers * attention_flops_per_pair(architecture)
        + sampled_tokens * lm_head(architecture).flops_per_token
    )


def causal_pairs(chunk_tokens: int, context_before: int, sliding_window: int | None = None) -> int:
    """Query-key pairs of a chunk: its queries see the keys before it and those up to their own.

    Args:
        chunk_tokens: queries, at least 1.
        context_before: keys that were there before the chunk, at least 0.
        sliding_window: keys a query sees at most, its own included; None for no limit.
    """
    if chunk_tokens < 1 or context_before < 0:
        raise ValueError(
            f"chunk_tokens={chunk_tokens} must be at least 1 and "
            f"context_before={context_before} at least 0"
        )
    unlimited = chunk_tokens
    if sliding_window is not None:
        unlimited = min(max(sliding_window - context_before, 0), chunk_tokens)
    pairs = unlimited * context_before + unlimited * (unlimited + 1) // 2
    return pairs + (chunk_tokens - unlimited) * (sliding_window or 0)


def layer_flops_per_token(architecture: Architecture) -> int:
    """FLOPs of all matrices of all layers for one token: everything but attention and lm_head."""
    return sum(linear.layers * linear.flops_per_token for linear in layer_linears(architecture))


def attention_flops_per_pair(architecture: Architecture) -> int:
    """FLOPs of one query-key pair in one layer, all heads: its score and its weighted value."""
    return 4 * architecture.query_size
