"""Attention of one new token a sequence over its paged context, split over the context.

query [num_sequences, num_heads, head_dim] over keys and values [context, num_kv_heads, head_dim]
that the block tables name; query heads share keys in groups of num_heads / num_kv_heads. Splits of
a context run side by side, each leaves its average and log-sum-exp, a second kernel merges them
(Flash-Decoding, Dao et al., 2023).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from backends.kernels.dispatch import constexpr, runs_triton, tl, triton
from backends.kernels.online_softmax import (
    LOG2_E,
    absorb_tile,
    gather_slots,
    merge_splits_kernel,
)
from backends.kernels.paged import KvCache, check_paging, context_slots, tile_sizes
from backends.kernels.products import dot

MIN_SPLIT_TOKENS = 256
"""A split shorter than this costs more to merge than it saves."""


def paged_decode_attention_reference(
    query: Tensor, cache: KvCache, block_tables: Tensor, context_lengths: Tensor, scale: float
) -> Tensor:
    """What `paged_decode_attention` computes, in plain torch without a loop over sequences.

    The gather copies num_sequences * longest context tokens of keys and values, so each byte is
    read twice and written once, padding included; a kernel reads each valid byte once.
    """
    max_context = int(context_lengths.max()) if len(context_lengths) else 0
    if max_context == 0:
        return torch.zeros_like(query)
    slots = context_slots(block_tables, context_lengths, max_context, cache.key.shape[1])
    key, value = (
        part.flatten(0, 1).index_select(0, slots.flatten()).view(*slots.shape, *part.shape[2:])
        for part in cache
    )
    tokens = torch.arange(max_context, device=query.device)
    visible = tokens[None, :] < context_lengths[:, None]
    attended = scaled_dot_product_attention(
        query[:, :, None, :],
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=visible[:, None, None, :],
        scale=scale,
        enable_gqa=True,
    )
    return attended[:, :, 0, :].masked_fill((context_lengths == 0)[:, None, None], 0.0)


# table_stride changes from batch to batch; Triton would compile anew for 1 and multiples of 16.
@triton.jit(do_not_specialize=["table_stride"])
def decode_split_kernel(  # noqa: PLR0913, PLR0917
    query_pointer,
    key_pointer,
    value_pointer,
    table_pointer,
    length_pointer,
    partial_pointer,
    lse_pointer,
    scale_log2,
    query_stride,
    table_stride,
    GROUP: constexpr,
    GROUP_TILE: constexpr,
    HEAD_DIM: constexpr,
    DIM_TILE: constexpr,
    BLOCK_SIZE: constexpr,
    TOKEN_TILE: constexpr,
):
    """One program a sequence, key head and split: the query heads of the group share its loads."""
    sequence = tl.program_id(0).to(tl.int64)
    kv_head, split = tl.program_id(1), tl.program_id(2)
    num_kv_heads, num_splits = tl.num_programs(1), tl.num_programs(2)
    length = tl.load(length_pointer + sequence)
    split_tokens = tl.cdiv(tl.cdiv(length, num_splits), TOKEN_TILE) * TOKEN_TILE
    first = split * split_tokens
    last = tl.minimum(first + split_tokens, length)

    members, dims = tl.arange(0, GROUP_TILE), tl.arange(0, DIM_TILE)
    heads = kv_head * GROUP + members
    inside_row = (members < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    offsets = heads[:, None] * HEAD_DIM + dims[None, :]
    query_row = query_pointer + sequence * query_stride
    query = tl.load(query_row + offsets, mask=inside_row, other=0.0)
    running_max = tl.full([GROUP_TILE], float("-inf"), tl.float32)
    running_sum = tl.zeros([GROUP_TILE], tl.float32)
    accumulated = tl.zeros([GROUP_TILE, DIM_TILE], tl.float32)
    for start in range(first, last, TOKEN_TILE):
        tokens = start + tl.arange(0, TOKEN_TILE)
        inside = tokens < last
        slots = gather_slots(table_pointer + sequence * table_stride, tokens, inside, BLOCK_SIZE)
        rows = (slots * num_kv_heads + kv_head) * HEAD_DIM
        mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
        key = tl.load(key_pointer + rows[:, None] + dims[None, :], mask=mask, other=0.0)
        value = tl.load(value_pointer + rows[:, None] + dims[None, :], mask=mask, other=0.0)
        scores = dot(query, tl.trans(key)) * scale_log2
        scores = tl.where(inside[None, :], scores, float("-inf"))
        running_max, running_sum, accumulated = absorb_tile(
            scores, value, running_max, running_sum, accumulated
        )
    # An empty split keeps lse = -inf, weight zero in the merge.
    total = tl.where(running_sum == 0.0, 1.0, running_sum)
    row = (sequence * num_kv_heads * GROUP + heads) * num_splits + split
    places = partial_pointer + row[:, None] * HEAD_DIM + dims[None, :]
    tl.store(places, accumulated / total[:, None], mask=inside_row)
    tl.store(lse_pointer + row, running_max + tl.log2(total), mask=members < GROUP)


def paged_decode_attention(
    query: Tensor,
    cache: KvCache,
    block_tables: Tensor,
    context_lengths: Tensor,
    scale: float,
    num_splits: int | None = None,
) -> Tensor:
    """Attention of each query over its own context; an empty context gives zeros.

    Args:
        query: [num_sequences, num_heads, head_dim].
        cache: of this layer, the new token of each sequence already in it.
        block_tables: int32 [num_sequences, max_blocks]; entries past the length are not read.
        context_lengths: int32 [num_sequences], tokens stored, the new one included.
        scale: of the scores, usually head_dim ** -0.5.
        num_splits: of each context, chosen to fill the GPU if None; no effect on the reference.

    Returns:
        [num_sequences, num_heads, head_dim].
    """
    check_paging(query, cache, block_tables, context_lengths)
    if query.shape[0] != context_lengths.shape[0]:
        raise ValueError(
            f"query has {query.shape[0]} rows, context_lengths has {context_lengths.shape[0]}: "
            "decode takes one token a sequence; use paged_prefill_attention for more"
        )
    if not runs_triton(query):
        arguments = (query, cache, block_tables, context_lengths, scale)
        return paged_decode_attention_reference(*arguments)
    if num_splits is None:
        longest = block_tables.shape[1] * cache.key.shape[1]
        num_splits = _splits_to_fill(query, cache.key.shape[2], longest)
    return _launch(query, cache, block_tables, context_lengths, scale, num_splits)


def _splits_to_fill(query: Tensor, num_kv_heads: int, longest_context: int) -> int:
    """Splits for two programs a multiprocessor, from shapes alone: lengths stay on the GPU."""
    if not query.is_cuda:
        return 1
    processors = torch.cuda.get_device_properties(query.device).multi_processor_count
    wanted = 2 * processors // max(1, query.shape[0] * num_kv_heads)
    return max(1, min(wanted, longest_context // MIN_SPLIT_TOKENS))


def _launch(
    query: Tensor,
    cache: KvCache,
    block_tables: Tensor,
    context_lengths: Tensor,
    scale: float,
    num_splits: int,
) -> Tensor:
    (num_sequences, num_heads, head_dim), num_kv_heads = query.shape, cache.key.shape[2]
    group = num_heads // num_kv_heads
    dim_tile, token_tile = tile_sizes(head_dim, query.element_size())
    rows = (num_sequences, num_heads, num_splits)
    partial = torch.empty((*rows, head_dim), dtype=torch.float32, device=query.device)
    lse = torch.empty(rows, dtype=torch.float32, device=query.device)
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if num_sequences == 0:
        return output
    decode_split_kernel[(num_sequences, num_kv_heads, num_splits)](
        *(query, *cache, block_tables, context_lengths, partial, lse, scale * LOG2_E),
        *(query.stride(0), block_tables.stride(0)),
        GROUP=group,
        GROUP_TILE=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        DIM_TILE=dim_tile,
        BLOCK_SIZE=cache.key.shape[1],
        TOKEN_TILE=token_tile,
        num_warps=4,
        num_stages=2,
    )
    merge_splits_kernel[(num_sequences * num_heads,)](
        *(partial, lse, output, num_splits),
        HEAD_DIM=head_dim,
        DIM_TILE=dim_tile,
        SPLIT_TILE=triton.next_power_of_2(num_splits),
        num_warps=2,
    )
    return output
