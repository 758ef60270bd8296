"""The operators of one serving iteration: what each computes, reads and writes.

Bytes are what has to cross the memory at least once: weights, the input and the output of every
matrix, keys and values. Attention keeps its scores on chip. Norms, activations, rotary positions
and additions are taken to be fused into their neighbours.
"""

from collections.abc import Iterable
from typing import NamedTuple

from sim.models.dimensions import Architecture
from sim.models.flops import attention_flops_per_pair, causal_pairs
from sim.models.operators import Linear, layer_linears, lm_head
from sim.models.parameters import kv_bytes_per_token

__all__ = [
    "IterationShape",
    "Operator",
    "expected_experts",
    "iteration_operators",
    "kv_bytes_per_token",
]


class IterationShape(NamedTuple):
    """All that the operators need to know of a batch. `of` counts it from chunks and contexts."""

    prefill_tokens: int
    """Tokens of all chunks."""
    prefill_pairs: int
    """Causal query-key pairs of all chunks: of each c * before + c * (c + 1) / 2."""
    prefill_context: int
    """KV tokens that the chunks read: of each before + c."""
    num_prefills: int
    num_decodes: int
    decode_context: int
    """KV tokens that the decoding requests read, the new token of each included."""
    sampled_tokens: int
    """Positions that go through the lm_head."""

    @property
    def tokens(self) -> int:
        """Tokens that go through the layers."""
        return self.prefill_tokens + self.num_decodes

    @classmethod
    def of(
        cls,
        chunks: Iterable[tuple[int, int]],
        decode_contexts: Iterable[int],
        sampled_tokens: int,
        sliding_window: int | None = None,
    ) -> "IterationShape":
        """Count the shape of a batch.

        Args:
            chunks: (tokens, tokens of the request before them) of each prefill chunk.
            decode_contexts: KV tokens that each decoding request reads, its new one included.
            sampled_tokens: decoding requests, and chunks that end their prompt.
            sliding_window: the architecture's window; contexts and pairs are cut to it.
        """
        chunks, contexts = tuple(chunks), tuple(decode_contexts)
        if sliding_window is not None:
            contexts = tuple(min(context, sliding_window) for context in contexts)
        return cls(
            prefill_tokens=sum(tokens for tokens, _ in chunks),
            prefill_pairs=sum(causal_pairs(*chunk, sliding_window) for chunk in chunks),
            prefill_context=sum(
                tokens + (before if sliding_window is None else min(before, sliding_window - 1))
                for tokens, before in chunks
            ),
            num_prefills=len(chunks),
            num_decodes=len(contexts),
            decode_context=sum(contexts),
            sampled_tokens=sampled_tokens,
        )


class Operator(NamedTuple):
    """One operator of an iteration. FLOPs and bytes are of one execution, in one layer."""

    name: str
    # Hides tuple.count; a frozen dataclass doubles the time of a call that every iteration makes.
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    """Executions in the iteration: the layers that have it."""
    flops: int
    bytes_read: float
    """Not whole where the number of experts that are hit is an expectation."""
    bytes_written: float


def iteration_operators(
    architecture: Architecture, shape: IterationShape, dtype_bytes: int, kv_dtype_bytes: int
) -> list[Operator]:
    """The operators of one iteration, in order; those without work in it are left out.

    Attention writes the new keys and values to the cache and reads every context once from there.
    Of the experts those are read that at least one token is expected to hit: see
    `expected_experts`. The FLOPs are those of `causal_flops`, exactly.

    Args:
        architecture: the model. Its sliding window is not applied here but by `IterationShape.of`.
        shape: the batch.
        dtype_bytes: bytes of an element of weights and activations.
        kv_dtype_bytes: bytes of an element of the KV cache.
    """
    tokens = shape.tokens
    qkv, *others = layer_linears(architecture)
    operators: list[Operator] = []
    if tokens:
        moved = tokens * architecture.hidden_size * dtype_bytes
        # A learned position is a second row of the same length.
        rows = 2 if architecture.learned_positions else 1
        operators.append(Operator("embedding", 1, 0, rows * moved, moved))
        operators.append(_linear_operator(qkv, tokens, dtype_bytes))
        operators += _attention(architecture, shape, dtype_bytes, kv_dtype_bytes)
        operators += [_linear_operator(linear, tokens, dtype_bytes) for linear in others]
    if shape.sampled_tokens:
        head = lm_head(architecture)
        operators.append(_linear_operator(head, shape.sampled_tokens, dtype_bytes))
    return operators


def expected_experts(num_experts: int, experts_per_token: int, tokens: int) -> float:
    """Distinct experts that `tokens` tokens are expected to hit.

    Every token picks its experts uniformly and independently of the others, so each expert is
    missed by all with probability (1 - k/E)^t. Skewed routing hits fewer.
    """
    return num_experts * (1.0 - (1.0 - experts_per_token / num_experts) ** tokens)


def _linear_operator(linear: Linear, tokens: int, dtype_bytes: int) -> Operator:
    copies = 1.0
    if linear.copies > 1:
        copies = expected_experts(linear.copies, linear.used, tokens)
    rows = tokens * linear.used
    return Operator(
        linear.name,
        linear.layers,
        tokens * linear.flops_per_token,
        (copies * linear.parameters + rows * linear.inputs) * dtype_bytes,
        rows * linear.outputs * dtype_bytes,
    )


def _attention(
    architecture: Architecture, shape: IterationShape, dtype_bytes: int, kv_dtype_bytes: int
) -> list[Operator]:
    """Attention of the chunks and of the decoding requests: two kernels of unlike intensity."""
    a = architecture
    kv_bytes = 2 * a.kv_size * kv_dtype_bytes
    halves = (
        ("attention_prefill", shape.prefill_tokens, shape.prefill_pairs, shape.prefill_context),
        ("attention_decode", shape.num_decodes, shape.decode_context, shape.decode_context),
    )
    return [
        Operator(
            name,
            a.num_layers,
            pairs * attention_flops_per_pair(a),
            tokens * (a.query_size + 2 * a.kv_size) * dtype_bytes + context * kv_bytes,
            tokens * a.query_size * dtype_bytes + tokens * kv_bytes,
        )
        for name, tokens, pairs, context in halves
        if tokens
    ]
