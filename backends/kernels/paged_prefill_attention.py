"""Causal attention of prefill chunks over the paged context that ends with them.

query [tokens, num_heads, head_dim] holds the chunks of all sequences one after the other, sequence
s at query_starts[s] : query_starts[s + 1]. Its chunk is the end of its context: row i stands at
context_length - chunk_length + i and sees every key up to itself, cached prefix included.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from backends.kernels.checks import check_index, check_shape
from backends.kernels.dispatch import constexpr, runs_triton, tl, triton
from backends.kernels.online_softmax import LOG2_E, absorb_tile, gather_slots
from backends.kernels.paged import KvCache, check_paging, context_slots, tile_sizes
from backends.kernels.products import dot
from backends.kernels.tiles import request_of_tile


def paged_prefill_attention_reference(
    query: Tensor,
    cache: KvCache,
    block_tables: Tensor,
    context_lengths: Tensor,
    query_starts: Tensor,
    scale: float,
) -> Tensor:
    """What `paged_prefill_attention` computes, in plain torch, a sequence at a time.

    A loop, because chunks of unlike lengths padded to one rectangle would cost more than they save.
    """
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    starts, lengths = query_starts.tolist(), context_lengths.tolist()
    for sequence, length in enumerate(lengths):
        start, end = starts[sequence], starts[sequence + 1]
        if end - start > length:
            raise ValueError(
                f"sequence {sequence}: chunk of {end - start} tokens must not exceed its "
                f"context_length={length}; count the chunk's own tokens in the context"
            )
        if end == start:
            continue
        one = slice(sequence, sequence + 1)
        slots = context_slots(block_tables[one], context_lengths[one], length, cache.key.shape[1])
        key, value = (part.flatten(0, 1)[slots].transpose(1, 2) for part in cache)
        output[start:end] = _causal_attention(query[start:end], key, value, scale)
    return output


def _causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention of the last [chunk, num_heads, head_dim] over [1, num_kv_heads, context, dim]."""
    chunk, context = query.shape[0], key.shape[2]
    mask = None
    if chunk < context:  # torch's own causal mask starts at the first key, ours ends at the last
        positions = torch.arange(context, device=query.device)
        mask = positions[None, :] <= positions[context - chunk :, None]
    attended = scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=True,
    )
    return attended[0].transpose(0, 1)


# Both change from batch to batch; Triton would compile anew for 1 and for multiples of 16.
@triton.jit(do_not_specialize=["table_stride", "num_sequences"])
def prefill_kernel(  # noqa: PLR0913, PLR0917
    query_pointer,
    key_pointer,
    value_pointer,
    table_pointer,
    length_pointer,
    starts_pointer,
    output_pointer,
    scale_log2,
    query_stride,
    table_stride,
    num_sequences,
    GROUP: constexpr,
    HEAD_DIM: constexpr,
    DIM_TILE: constexpr,
    BLOCK_SIZE: constexpr,
    TOKEN_TILE: constexpr,
    QUERY_TILE: constexpr,
):
    """One program a tile of queries of one sequence and head."""
    tile, head = tl.program_id(0), tl.program_id(1)
    kv_head, num_kv_heads = head // GROUP, tl.num_programs(1) // GROUP
    sequence = request_of_tile(tile, starts_pointer, num_sequences, QUERY_TILE)
    start = tl.load(starts_pointer + sequence)
    chunk = tl.load(starts_pointer + sequence + 1) - start
    first_row = (tile - start // QUERY_TILE - sequence) * QUERY_TILE
    if first_row >= chunk:
        return
    length = tl.load(length_pointer + sequence)
    rows, dims = first_row + tl.arange(0, QUERY_TILE), tl.arange(0, DIM_TILE)
    positions = length - chunk + rows
    inside_row = (rows < chunk)[:, None] & (dims < HEAD_DIM)[None, :]
    tokens_in = (start + rows).to(tl.int64)[:, None]
    places = tokens_in * query_stride + head * HEAD_DIM + dims[None, :]
    query = tl.load(query_pointer + places, mask=inside_row, other=0.0)
    running_max = tl.full([QUERY_TILE], float("-inf"), tl.float32)
    running_sum = tl.zeros([QUERY_TILE], tl.float32)
    accumulated = tl.zeros([QUERY_TILE, DIM_TILE], tl.float32)
    table = table_pointer + sequence.to(tl.int64) * table_stride
    for first in range(0, tl.minimum(length, length - chunk + first_row + QUERY_TILE), TOKEN_TILE):
        tokens = first + tl.arange(0, TOKEN_TILE)
        inside = tokens < length
        slots = gather_slots(table, tokens, inside, BLOCK_SIZE)
        cached = ((slots * num_kv_heads + kv_head) * HEAD_DIM)[:, None] + dims[None, :]
        mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
        key = tl.load(key_pointer + cached, mask=mask, other=0.0)
        value = tl.load(value_pointer + cached, mask=mask, other=0.0)
        scores = dot(query, tl.trans(key)) * scale_log2
        visible = inside[None, :] & (tokens[None, :] <= positions[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        running_max, running_sum, accumulated = absorb_tile(
            scores, value, running_max, running_sum, accumulated
        )
    places = (tokens_in * tl.num_programs(1) + head) * HEAD_DIM + dims[None, :]
    result = (accumulated / running_sum[:, None]).to(output_pointer.dtype.element_ty)
    tl.store(output_pointer + places, result, mask=inside_row)


def paged_prefill_attention(
    query: Tensor,
    cache: KvCache,
    block_tables: Tensor,
    context_lengths: Tensor,
    query_starts: Tensor,
    scale: float,
) -> Tensor:
    """Causal attention of each chunk over the context that it ends.

    Args:
        query: [tokens, num_heads, head_dim], the chunks one after the other.
        cache: of this layer, the chunks already in it.
        block_tables: int32 [num_sequences, max_blocks]; entries past the length are not read.
        context_lengths: int32 [num_sequences], tokens stored, the chunk's own included.
        query_starts: int32 [num_sequences + 1], from 0 to tokens; equal neighbours: no chunk.
        scale: of the scores, usually head_dim ** -0.5.

    Returns:
        [tokens, num_heads, head_dim].
    """
    check_paging(query, cache, block_tables, context_lengths)
    num_sequences = context_lengths.shape[0]
    check_shape("query_starts", query_starts, (num_sequences + 1,), "num_sequences + 1 offsets")
    check_index("query_starts", query_starts, torch.int32, query)
    if not runs_triton(query):
        arguments = (query, cache, block_tables, context_lengths, query_starts, scale)
        return paged_prefill_attention_reference(*arguments)
    (tokens, num_heads, head_dim), num_kv_heads = query.shape, cache.key.shape[2]
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if tokens == 0:
        return output
    dim_tile, token_tile = tile_sizes(head_dim, query.element_size())
    query_tile = 128 // query.element_size()
    prefill_kernel[(tokens // query_tile + num_sequences, num_heads)](
        *(query, *cache, block_tables, context_lengths, query_starts, output, scale * LOG2_E),
        *(query.stride(0), block_tables.stride(0), num_sequences),
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        DIM_TILE=dim_tile,
        BLOCK_SIZE=cache.key.shape[1],
        TOKEN_TILE=token_tile,
        QUERY_TILE=query_tile,
        num_warps=4,
        num_stages=2,
    )
    return output
