"""One round of a ring of striped causal prefill: own queries over the keys that came round.

Of d instances, instance i holds tokens i, i + d, i + 2d, ... of each prompt, prompts one after the
other, query [tokens, num_heads, head_dim]. A round goes on from the state that the last one left:
an average over the keys seen so far and their log-sum-exp. Keys later than a tile of queries are
not read, so with stripes each round costs each instance about the same (Striped Attention, Brandon
et al., 2023; ring: Liu et al., 2023).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backends.kernels.checks import check_index, check_shape
from backends.kernels.dispatch import constexpr, runs_triton, tl, triton
from backends.kernels.merge_parts import TO_LOG2
from backends.kernels.online_softmax import LOG2_E, absorb_tile
from backends.kernels.paged import tile_sizes
from backends.kernels.part_decode_attention import check_heads
from backends.kernels.part_softmax import request_bounds, weigh_values
from backends.kernels.products import dot, load_rows
from backends.kernels.tiles import count_up_to, place_of_tile

REFERENCE_ROWS = 64
"""Queries that the reference takes at once: few, so later keys are skipped and scores cached."""


class Stripe(NamedTuple):
    """Which tokens of which prompts an instance holds."""

    positions: Tensor
    """int32 [tokens], increasing within a request"""
    starts: Tensor
    """int32 [requests + 1], from 0 to tokens; equal neighbours: none of that request is here"""


class RingState(NamedTuple):
    """What the rounds so far have seen of the keys of each query."""

    output: Tensor
    """float32 [tokens, num_heads, head_dim], average of the values seen, 0 before the first"""
    lse: Tensor
    """float32 [tokens, num_heads], natural log-sum-exp of the scaled scores, -inf before"""


def new_state(tokens: int, num_heads: int, head_dim: int, device: torch.device | str) -> RingState:
    """State of queries that have seen no key."""
    output = torch.zeros(tokens, num_heads, head_dim, device=device, dtype=torch.float32)
    lse = torch.full((tokens, num_heads), -torch.inf, device=device, dtype=torch.float32)
    return RingState(output, lse)


def striped_prefill_attention_reference(
    query: Tensor,
    kv: tuple[Tensor, Tensor],
    queries: Stripe,
    keys: Stripe,
    scale: float,
    state: RingState,
) -> None:
    """What `striped_prefill_attention` computes, in plain torch, some queries of one at a time."""
    query_bounds = request_bounds("queries.starts", queries.starts, query.shape[0])
    key_bounds = request_bounds("keys.starts", keys.starts, kv[0].shape[0])
    for (start, end), (first, last) in zip(query_bounds, key_bounds, strict=True):
        if start == end or first == last:
            continue
        # Head by head [num_kv_heads, keys, head_dim], as the batched products take them.
        key, value = (part[first:last].float().transpose(0, 1).contiguous() for part in kv)
        for row in range(start, end, REFERENCE_ROWS):
            rows = slice(row, min(row + REFERENCE_ROWS, end))
            part = RingState(state.output[rows], state.lse[rows])
            times = (queries.positions[rows], keys.positions[first:last])
            _attend_rows(query[rows].float() * scale, (key, value), times, part)


def _attend_rows(
    query: Tensor, kv: tuple[Tensor, Tensor], positions: tuple[Tensor, Tensor], state: RingState
) -> None:
    """Scaled queries [rows, num_heads, head_dim] over kv [num_kv_heads, keys, head_dim] each."""
    at, key_at = positions
    seen_by_all, seen = torch.searchsorted(key_at, at[[0, -1]], right=True).tolist()
    if seen == 0:
        return
    (rows, num_heads, head_dim), num_kv_heads = query.shape, kv[0].shape[0]
    key, value = (part[:, :seen] for part in kv)
    heads = query.transpose(0, 1).reshape(num_kv_heads, -1, head_dim)
    scores = torch.bmm(heads, key.mT)
    future = key_at[None, seen_by_all:seen] > at[:, None]
    by_head = scores.view(num_heads, rows, seen)
    by_head[:, :, seen_by_all:].masked_fill_(future, -torch.inf)
    output, lse = weigh_values(scores, value)
    output, lse = output.view(num_heads, rows, head_dim), lse.view(num_heads, rows)
    _absorb(state, output.transpose(0, 1), lse.T)


def _absorb(state: RingState, output: Tensor, lse: Tensor) -> None:
    """Merge an average over more keys into the state, in place."""
    merged = torch.logaddexp(state.lse, lse)
    finite = merged.masked_fill(merged == -torch.inf, 0.0)
    state.output.mul_((state.lse - finite).exp_()[..., None])
    state.output.addcmul_(output, (lse - finite).exp_()[..., None])
    state.lse.copy_(merged)


@triton.jit
def keys_up_to(last, request, positions_pointer, starts_pointer):
    """Where the keys of a request start, and how many stand at positions up to `last`."""
    start = tl.load(starts_pointer + request)
    num_keys = tl.load(starts_pointer + request + 1) - start
    return start, count_up_to(positions_pointer + start, num_keys, last)


@triton.jit
def resume(state_pointer, lse_pointer, rows, inside, dims, HEAD_DIM: constexpr):
    """Running maximum, sum and weighted values of a softmax from the state that a round left.

    The maximum is finite where nothing was seen: such a row may see nothing of the next tile.
    """
    lse = tl.load(lse_pointer + rows, mask=inside, other=float("-inf"))
    is_new = lse == float("-inf")
    running_max = tl.where(is_new, -1e30, lse * TO_LOG2)
    running_sum = tl.where(is_new, 0.0, 1.0)
    accumulated = load_rows(state_pointer + rows * HEAD_DIM, inside, dims, HEAD_DIM)
    return running_max, running_sum, accumulated


@triton.jit
def leave(  # noqa: PLR0913, PLR0917
    state_pointer,
    lse_pointer,
    rows,
    inside,
    dims,
    running_max,
    running_sum,
    accumulated,
    HEAD_DIM: constexpr,
):
    """Store the state that the next round resumes from."""
    total = tl.where(running_sum == 0.0, 1.0, running_sum)
    places = state_pointer + rows[:, None] * HEAD_DIM + dims[None, :]
    mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(places, accumulated / total[:, None], mask=mask)
    lse = tl.where(running_sum == 0.0, float("-inf"), (running_max + tl.log2(total)) / TO_LOG2)
    tl.store(lse_pointer + rows, lse, mask=inside)


# It changes from batch to batch; Triton would compile anew for 1 and for multiples of 16.
@triton.jit(do_not_specialize=["num_requests"])
def striped_prefill_kernel(  # noqa: PLR0913, PLR0917
    query_pointer,
    key_pointer,
    value_pointer,
    query_positions_pointer,
    query_starts_pointer,
    key_positions_pointer,
    key_starts_pointer,
    state_pointer,
    lse_pointer,
    scale_log2,
    query_stride,
    key_stride,
    value_stride,
    num_requests,
    GROUP: constexpr,
    HEAD_DIM: constexpr,
    DIM_TILE: constexpr,
    TOKEN_TILE: constexpr,
    QUERY_TILE: constexpr,
):
    """One program a tile of queries of one request and head."""
    tile, head = tl.program_id(0), tl.program_id(1)
    request, start, num_queries, first_row = place_of_tile(
        tile, query_starts_pointer, num_requests, QUERY_TILE
    )
    if first_row >= num_queries:
        return
    last_row = tl.minimum(first_row + QUERY_TILE, num_queries) - 1
    last = tl.load(query_positions_pointer + start + last_row)
    key_start, seen = keys_up_to(last, request, key_positions_pointer, key_starts_pointer)
    if seen == 0:
        return
    rows, dims = first_row + tl.arange(0, QUERY_TILE), tl.arange(0, DIM_TILE)
    inside_rows = rows < num_queries
    at = tl.load(query_positions_pointer + start + rows, mask=inside_rows, other=-1)
    tokens_in = (start + rows).to(tl.int64)
    query_rows = query_pointer + tokens_in * query_stride + head * HEAD_DIM
    query = load_rows(query_rows, inside_rows, dims, HEAD_DIM)
    state_rows = tokens_in * tl.num_programs(1) + head
    running_max, running_sum, accumulated = resume(
        state_pointer, lse_pointer, state_rows, inside_rows, dims, HEAD_DIM
    )
    key_head = (head // GROUP) * HEAD_DIM
    for token in range(0, seen, TOKEN_TILE):
        tokens = token + tl.arange(0, TOKEN_TILE)
        inside = tokens < seen
        key_at = tl.load(key_positions_pointer + key_start + tokens, mask=inside, other=0)
        keys_in = (key_start + tokens).to(tl.int64)
        key_rows, value_rows = keys_in * key_stride + key_head, keys_in * value_stride + key_head
        key = load_rows(key_pointer + key_rows, inside, dims, HEAD_DIM)
        value = load_rows(value_pointer + value_rows, inside, dims, HEAD_DIM)
        scores = dot(query, tl.trans(key)) * scale_log2
        visible = inside[None, :] & (key_at[None, :] <= at[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        running_max, running_sum, accumulated = absorb_tile(
            scores, value, running_max, running_sum, accumulated
        )
    state = (state_pointer, lse_pointer, state_rows, inside_rows, dims)
    leave(*state, running_max, running_sum, accumulated, HEAD_DIM)


def striped_prefill_attention(
    query: Tensor,
    kv: tuple[Tensor, Tensor],
    queries: Stripe,
    keys: Stripe,
    scale: float,
    state: RingState,
) -> None:
    """Let each query see the keys of its own request that are not later than itself.

    Args:
        query: [tokens, num_heads, head_dim], this instance's, the same in every round.
        kv: keys and values [kv_tokens, num_kv_heads, head_dim] each, which came round.
        queries: of `query`.
        keys: of `kv`, over the same requests.
        scale: of the scores, usually head_dim ** -0.5.
        state: of the rounds before, from `new_state`; changed in place.
    """
    _check(query, kv, queries, keys, state)
    if not runs_triton(query):
        striped_prefill_attention_reference(query, kv, queries, keys, scale, state)
        return
    (tokens, num_heads, head_dim), num_requests = query.shape, queries.starts.shape[0] - 1
    if tokens == 0 or kv[0].shape[0] == 0:
        return
    dim_tile, token_tile = tile_sizes(head_dim, query.element_size())
    query_tile = 128 // query.element_size()
    striped_prefill_kernel[(tokens // query_tile + num_requests, num_heads)](
        *(query, *kv, *queries, *keys, *state, scale * LOG2_E),
        *(query.stride(0), kv[0].stride(0), kv[1].stride(0), num_requests),
        GROUP=num_heads // kv[0].shape[1],
        HEAD_DIM=head_dim,
        DIM_TILE=dim_tile,
        TOKEN_TILE=token_tile,
        QUERY_TILE=query_tile,
        num_warps=4,
        num_stages=2,
    )


def _check(
    query: Tensor, kv: tuple[Tensor, Tensor], queries: Stripe, keys: Stripe, state: RingState
) -> None:
    check_heads(query, *kv)
    for name, stripe, rows in (("queries", queries, query), ("keys", keys, kv[0])):
        rule = f"a position for each of the {rows.shape[0]} rows"
        check_shape(f"{name}.positions", stripe.positions, (rows.shape[0],), rule)
        check_shape(f"{name}.starts", stripe.starts, (None,), "requests + 1 offsets")
        for what, tensor in zip(stripe._fields, stripe, strict=True):
            check_index(f"{name}.{what}", tensor, torch.int32, query)
            _check_contiguous(f"{name}.{what}", tensor)
    rule = "requests + 1 of queries.starts: keys and queries are of the same requests"
    check_shape("keys.starts", keys.starts, tuple(queries.starts.shape), rule)
    if queries.starts.shape[0] < 2:
        raise ValueError(
            f"queries.starts.shape={list(queries.starts.shape)} must hold at least 2 offsets, "
            "those of one request; call with the requests of the batch"
        )
    check_shape("state.output", state.output, tuple(query.shape), "the shape of query")
    check_shape("state.lse", state.lse, tuple(query.shape[:2]), "tokens, num_heads of query")
    for name, tensor in zip(state._fields, state, strict=True):
        check_index(f"state.{name}", tensor, torch.float32, query)
        _check_contiguous(f"state.{name}", tensor)


def _check_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name}.stride()={tensor.stride()} must be contiguous; pass a contiguous copy"
        )
