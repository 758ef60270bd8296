"""Attention of new tokens over that part of their KV which lies here, stage 1 of two.

query [n, num_heads, head_dim] over rows of a pool [slots, num_kv_heads, head_dim] of one layer, in
any order; query heads share keys in groups of num_heads / num_kv_heads. What comes back is averaged
within the part and goes with its log-sum-exp to `merge_parts` (LoongServe, section 4.2).
The rows of all requests are cut into splits of one length that run side by side (Flash-Decoding,
Dao et al., 2023), so one long request fills a GPU, and so do many of unlike length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backends.kernels.checks import (
    check_float,
    check_index,
    check_like,
    check_packed,
    check_shape,
)
from backends.kernels.dispatch import constexpr, runs_triton, tl, triton
from backends.kernels.merge_parts import PART_TILE, TO_LOG2, merge_row
from backends.kernels.online_softmax import LOG2_E, absorb_tile
from backends.kernels.paged import tile_sizes
from backends.kernels.part_softmax import request_bounds, weigh_values
from backends.kernels.products import dot
from backends.kernels.tiles import place_of_tile

MIN_SPLIT_TOKENS = 256
"""A split shorter than this costs more to merge than it saves."""
MAX_PADDING_TOKENS = 64
"""The reference pads a request by at most this much to save calls of torch."""


def part_decode_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, slots: Tensor, starts: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """What `part_decode_attention` computes, in plain torch, requests of like length together."""
    output = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
    lse = torch.full(query.shape[:2], -torch.inf, device=query.device)
    bounds = request_bounds("starts", starts, slots.shape[0])
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    heads = torch.arange(num_kv_heads, device=query.device)
    for group in _of_like_length([end - first for first, end in bounds]):
        firsts, ends = torch.tensor([bounds[request] for request in group]).to(slots.device).T
        longest = int((ends - firsts).max())
        places = firsts[:, None] + torch.arange(longest, device=slots.device)
        padding = places >= ends[:, None]
        # Padding repeats the last row of the part: it is masked, but must be finite.
        rows = slots[torch.minimum(places, ends[:, None] - 1)].long()
        rows = (rows[:, None, :] * num_kv_heads + heads[:, None]).flatten()
        shape = (len(group) * num_kv_heads, longest, -1)
        keys, values = (
            part.flatten(0, 1).index_select(0, rows).view(shape).float() for part in (key, value)
        )
        queries = query[group].float().reshape(shape[0], num_heads // num_kv_heads, -1)
        scores = torch.bmm(queries, keys.mT).mul_(scale)
        scores.view(len(group), num_heads, longest).masked_fill_(padding[:, None], -torch.inf)
        averaged, sums = weigh_values(scores, values)
        output[group] = averaged.view(len(group), num_heads, -1)
        lse[group] = sums.view(len(group), num_heads)
    return output, lse


def _of_like_length(lengths: list[int]) -> list[list[int]]:
    """Indices of positive lengths, those together that differ by at most the padding allowed."""
    groups: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        if lengths[index] == 0:
            break
        if not groups or longest - lengths[index] > MAX_PADDING_TOKENS:
            groups.append([])
            longest = lengths[index]
        groups[-1].append(index)
    return groups


# Both change from batch to batch; Triton would compile anew for 1 and for multiples of 16.
@triton.jit(do_not_specialize=["num_requests", "split_tokens"])
def part_split_kernel(  # noqa: PLR0913, PLR0917
    query_pointer,
    key_pointer,
    value_pointer,
    slots_pointer,
    starts_pointer,
    partial_pointer,
    lse_pointer,
    scale_log2,
    query_stride,
    num_requests,
    split_tokens,
    GROUP: constexpr,
    GROUP_TILE: constexpr,
    HEAD_DIM: constexpr,
    DIM_TILE: constexpr,
    TOKEN_TILE: constexpr,
):
    """One program a split and key head: the query heads of the group share its loads."""
    split, kv_head = tl.program_id(0), tl.program_id(1)
    num_kv_heads = tl.num_programs(1)
    place = place_of_tile(split, starts_pointer, num_requests, split_tokens)
    request, start, length, first = place
    if first >= length:
        return
    last = tl.minimum(first + split_tokens, length)
    members, dims = tl.arange(0, GROUP_TILE), tl.arange(0, DIM_TILE)
    heads = kv_head * GROUP + members
    inside_row = (members < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    query_row = query_pointer + request.to(tl.int64) * query_stride
    offsets = heads[:, None] * HEAD_DIM + dims[None, :]
    query = tl.load(query_row + offsets, mask=inside_row, other=0.0)
    running_max = tl.full([GROUP_TILE], float("-inf"), tl.float32)
    running_sum = tl.zeros([GROUP_TILE], tl.float32)
    accumulated = tl.zeros([GROUP_TILE, DIM_TILE], tl.float32)
    for token in range(first, last, TOKEN_TILE):
        tokens = token + tl.arange(0, TOKEN_TILE)
        inside = tokens < last
        slots = tl.load(slots_pointer + start + tokens, mask=inside, other=0).to(tl.int64)
        rows = ((slots * num_kv_heads + kv_head) * HEAD_DIM)[:, None] + dims[None, :]
        mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
        key = tl.load(key_pointer + rows, mask=mask, other=0.0)
        value = tl.load(value_pointer + rows, mask=mask, other=0.0)
        scores = dot(query, tl.trans(key)) * scale_log2
        scores = tl.where(inside[None, :], scores, float("-inf"))
        running_max, running_sum, accumulated = absorb_tile(
            scores, value, running_max, running_sum, accumulated
        )
    row = split.to(tl.int64) * num_kv_heads * GROUP + heads
    places = partial_pointer + row[:, None] * HEAD_DIM + dims[None, :]
    tl.store(places, accumulated / running_sum[:, None], mask=inside_row)
    lse = (running_max + tl.log2(running_sum)) / TO_LOG2
    tl.store(lse_pointer + row, lse, mask=members < GROUP)


@triton.jit(do_not_specialize=["split_tokens"])
def merge_part_kernel(  # noqa: PLR0913, PLR0917
    partial_pointer,
    lse_pointer,
    starts_pointer,
    merged_pointer,
    merged_lse_pointer,
    split_tokens,
    HEAD_DIM: constexpr,
    DIM_TILE: constexpr,
    PARTS_TILE: constexpr,
):
    """One program a request and head: its splits, found as `part_split_kernel` laid them."""
    request, head, num_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    start = tl.load(starts_pointer + request)
    splits = tl.cdiv(tl.load(starts_pointer + request + 1) - start, split_tokens)
    first = (start // split_tokens + request).to(tl.int64) * num_heads + head
    dims = tl.arange(0, DIM_TILE)
    merged, lse = merge_row(
        partial_pointer + first * HEAD_DIM,
        lse_pointer + first,
        splits,
        num_heads * HEAD_DIM,
        num_heads,
        HEAD_DIM,
        DIM_TILE,
        PARTS_TILE,
    )
    row = request.to(tl.int64) * num_heads + head
    tl.store(merged_pointer + row * HEAD_DIM + dims, merged, mask=dims < HEAD_DIM)
    tl.store(merged_lse_pointer + row + tl.arange(0, 1), lse)


def part_decode_attention(
    query: Tensor, key: Tensor, value: Tensor, slots: Tensor, starts: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of each query over the rows of the pool that hold its KV on this instance.

    Args:
        query: [n, num_heads, head_dim].
        key: [slots, num_kv_heads, head_dim], the pool of this layer, contiguous.
        value: the same shape and dtype as `key`.
        slots: int64 or int32 [total], rows of the pool, request after request, in any order.
        starts: int32 [n + 1], from 0 to total; equal neighbours: no KV of that request is here.
        scale: of the scores, usually head_dim ** -0.5.

    Returns:
        float32 [n, num_heads, head_dim], averaged within the part, and log-sum-exp of the scaled
        scores, float32 [n, num_heads], natural logarithm. An empty part gives 0 and -inf.
    """
    _check(query, key, value, slots, starts)
    if not runs_triton(query):
        return part_decode_attention_reference(query, key, value, slots, starts, scale)
    return _launch(query, key, value, slots, starts, scale)


def _launch(
    query: Tensor, key: Tensor, value: Tensor, slots: Tensor, starts: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    (n, num_heads, head_dim), num_kv_heads = query.shape, key.shape[1]
    output, lse = _empty_rows(n, query)
    if n == 0:
        return output, lse
    dim_tile, token_tile = tile_sizes(head_dim, query.element_size())
    tokens = split_tokens(slots.shape[0], num_kv_heads, query.device)
    num_splits = slots.shape[0] // tokens + n
    splits = _empty_rows(num_splits, query)
    part_split_kernel[(num_splits, num_kv_heads)](
        *(query, key, value, slots, starts, *splits, scale * LOG2_E),
        *(query.stride(0), n, tokens),
        GROUP=num_heads // num_kv_heads,
        GROUP_TILE=max(16, triton.next_power_of_2(num_heads // num_kv_heads)),
        HEAD_DIM=head_dim,
        DIM_TILE=dim_tile,
        TOKEN_TILE=token_tile,
        num_warps=4,
        num_stages=2,
    )
    merge_part_kernel[(n, num_heads)](
        *(*splits, starts, output, lse, tokens),
        HEAD_DIM=head_dim,
        DIM_TILE=dim_tile,
        PARTS_TILE=PART_TILE,
        num_warps=2,
    )
    return output, lse


def split_tokens(total: int, num_kv_heads: int, device: torch.device) -> int:
    """Rows a split for two programs a multiprocessor, from shapes alone: starts stay on the GPU."""
    if device.type != "cuda":
        return MIN_SPLIT_TOKENS
    programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    return max(MIN_SPLIT_TOKENS, -(-total * num_kv_heads // programs))


def _empty_rows(rows: int, query: Tensor) -> tuple[Tensor, Tensor]:
    """Room for averages [rows, num_heads, head_dim] and their log-sum-exp [rows, num_heads]."""
    shape = (rows, *query.shape[1:])
    output = torch.empty(shape, dtype=torch.float32, device=query.device)
    return output, torch.empty(shape[:2], dtype=torch.float32, device=query.device)


def _check(query: Tensor, key: Tensor, value: Tensor, slots: Tensor, starts: Tensor) -> None:
    check_heads(query, key, value)
    for name, tensor in (("key", key), ("value", value)):
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name}.stride()={tensor.stride()} must be contiguous, because slots are "
                "counted through it; allocate one tensor a layer"
            )
    check_shape("slots", slots, (None,), "a row of the pool for each token")
    index_dtype = torch.int32 if slots.dtype == torch.int32 else torch.int64
    check_index("slots", slots, index_dtype, query)
    check_shape("starts", starts, (query.shape[0] + 1,), "n + 1 offsets, n rows of query")
    check_index("starts", starts, torch.int32, query)
    for name, tensor in (("slots", slots), ("starts", starts)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous; pass {name}.contiguous()")


def check_heads(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuse keys and values [rows, num_kv_heads, head_dim] that do not fit the query's heads."""
    check_float("query", query)
    check_shape("query", query, (None, None, None), "rows, num_heads, head_dim")
    rule = f"rows, num_kv_heads, head_dim={query.shape[2]} of the query"
    check_shape("key", key, (None, None, query.shape[2]), rule)
    check_shape("value", value, tuple(key.shape), "the shape of key")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_like(name, tensor, "query", query)
        check_packed(name, tensor)
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"num_kv_heads={num_kv_heads} must divide num_heads={num_heads}; "
            "check the model's configuration or its tensor-parallel split"
        )
