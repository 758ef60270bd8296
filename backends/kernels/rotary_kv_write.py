"""Rotary position embedding of queries and keys, in place, and the write of keys and values.

Query [tokens, num_heads, head_dim] and key [tokens, num_kv_heads, head_dim] turn in the two halves
convention of Hugging Face's llama: dimension i pairs with i + head_dim / 2. Rotated keys and
values [tokens, num_kv_heads, head_dim] then go to their slots of the paged cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backends.kernels.checks import check_index, check_like, check_packed, check_shape
from backends.kernels.dispatch import constexpr, runs_triton, tl, triton
from backends.kernels.paged import KvCache, check_cache


class Rotation(NamedTuple):
    """The angle of each token: row positions[token] of the tables; one record for all layers."""

    cos: Tensor
    """float32 [max_positions, head_dim / 2]"""
    sin: Tensor
    """float32 [max_positions, head_dim / 2]"""
    positions: Tensor
    """int64 [tokens], each below max_positions (unchecked: a check would stall the GPU)"""


def rotary_tables(inverse_frequencies: Tensor, max_positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines float32 [max_positions, head_dim / 2] from frequencies [head_dim / 2]."""
    positions = torch.arange(max_positions, device=inverse_frequencies.device)
    angles = positions[:, None].float() * inverse_frequencies.float()[None, :]
    return angles.cos(), angles.sin()


def rotary_kv_write_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: Rotation,
    cache: KvCache,
    slot_mapping: Tensor,
) -> None:
    """What `rotary_kv_write` does, in plain torch."""
    cos = rotation.cos[rotation.positions][:, None, :]
    sin = rotation.sin[rotation.positions][:, None, :]
    for rows in (query, key):
        first, second = rows.float().chunk(2, dim=-1)
        rows.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))
    written = slot_mapping >= 0
    slots = slot_mapping[written]
    cache.key.flatten(0, 1)[slots] = key[written]
    cache.value.flatten(0, 1)[slots] = value[written]


@triton.jit
def rotate_rows(row_pointer, cos, sin, inside, dims, HALF: constexpr):
    """Turn heads [heads, head_dim] in place and return both turned halves [heads, HALF_TILE]."""
    dtype = row_pointer.dtype.element_ty
    first = tl.load(row_pointer + dims, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(row_pointer + HALF + dims, mask=inside, other=0.0).to(tl.float32)
    turned_first = (first * cos - second * sin).to(dtype)
    turned_second = (second * cos + first * sin).to(dtype)
    tl.store(row_pointer + dims, turned_first, mask=inside)
    tl.store(row_pointer + HALF + dims, turned_second, mask=inside)
    return turned_first, turned_second


@triton.jit
def rotary_kv_write_kernel(  # noqa: PLR0913, PLR0917
    query_pointer,
    key_pointer,
    value_pointer,
    cos_pointer,
    sin_pointer,
    position_pointer,
    key_cache_pointer,
    value_cache_pointer,
    slot_pointer,
    query_stride,
    key_stride,
    value_stride,
    num_heads,
    num_kv_heads,
    HALF: constexpr,
    HALF_TILE: constexpr,
    HEAD_TILE: constexpr,
):
    """One program a token and tile of heads: first the tiles of query heads, then those of keys."""
    token = tl.program_id(0).to(tl.int64)
    query_tiles = tl.cdiv(num_heads, HEAD_TILE)
    tile = tl.program_id(1)
    dims = tl.arange(0, HALF_TILE)[None, :]
    position = tl.load(position_pointer + token)
    cos = tl.load(cos_pointer + position * HALF + dims, mask=dims < HALF, other=0.0)
    sin = tl.load(sin_pointer + position * HALF + dims, mask=dims < HALF, other=0.0)
    if tile < query_tiles:
        heads = tile * HEAD_TILE + tl.arange(0, HEAD_TILE)[:, None]
        inside = (heads < num_heads) & (dims < HALF)
        row = query_pointer + token * query_stride + heads * (2 * HALF)
        rotate_rows(row, cos, sin, inside, dims, HALF)
    else:
        heads = (tile - query_tiles) * HEAD_TILE + tl.arange(0, HEAD_TILE)[:, None]
        inside = (heads < num_kv_heads) & (dims < HALF)
        row = key_pointer + token * key_stride + heads * (2 * HALF)
        first, second = rotate_rows(row, cos, sin, inside, dims, HALF)
        slot = tl.load(slot_pointer + token)
        if slot >= 0:
            cached = (slot * num_kv_heads + heads) * (2 * HALF) + dims
            tl.store(key_cache_pointer + cached, first, mask=inside)
            tl.store(key_cache_pointer + cached + HALF, second, mask=inside)
            source = value_pointer + token * value_stride + heads * (2 * HALF) + dims
            lower, upper = tl.load(source, mask=inside), tl.load(source + HALF, mask=inside)
            tl.store(value_cache_pointer + cached, lower, mask=inside)
            tl.store(value_cache_pointer + cached + HALF, upper, mask=inside)


def rotary_kv_write(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: Rotation,
    cache: KvCache,
    slot_mapping: Tensor,
) -> None:
    """Rotate `query` and `key` in place, then store `key` and `value` in the cache.

    Args:
        query: [tokens, num_heads, head_dim], changed; may be a view of a fused QKV row.
        key: [tokens, num_kv_heads, head_dim], changed.
        value: [tokens, num_kv_heads, head_dim].
        rotation: tables and the position of each token.
        cache: of this layer, changed at the slots named.
        slot_mapping: int64 [tokens], block * block_size + offset, all different; -1 writes nothing.
    """
    _check(query, key, value, rotation, cache, slot_mapping)
    if not runs_triton(query):
        rotary_kv_write_reference(query, key, value, rotation, cache, slot_mapping)
        return
    tokens, num_heads, head_dim = query.shape
    num_kv_heads, half = key.shape[1], head_dim // 2
    head_tile = min(8, triton.next_power_of_2(num_kv_heads))
    tiles = triton.cdiv(num_heads, head_tile) + triton.cdiv(num_kv_heads, head_tile)
    if tokens:
        rotary_kv_write_kernel[(tokens, tiles)](
            *(query, key, value, *rotation, *cache, slot_mapping),
            *(query.stride(0), key.stride(0), value.stride(0), num_heads, num_kv_heads),
            HALF=half,
            HALF_TILE=triton.next_power_of_2(half),
            HEAD_TILE=head_tile,
            num_warps=2,
        )


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: Rotation,
    cache: KvCache,
    slot_mapping: Tensor,
) -> None:
    check_cache(cache, query)
    tokens, _, head_dim = query.shape
    if head_dim % 2:
        raise ValueError(f"head_dim={head_dim} must be even, since halves turn; pad the heads")
    for name, rows in (("key", key), ("value", value)):
        shape = (tokens, cache.key.shape[2], head_dim)
        check_shape(
            name, rows, shape, "tokens of the query, num_kv_heads and head_dim of the cache"
        )
        check_like(name, rows, "query", query)
        check_packed(name, rows)
    for name, table in (("cos", rotation.cos), ("sin", rotation.sin)):
        check_shape(f"rotation.{name}", table, (None, head_dim // 2), "max_positions, head_dim / 2")
        check_index(f"rotation.{name}", table, torch.float32, query)
        check_packed(f"rotation.{name}", table)
    for name, index in (("rotation.positions", rotation.positions), ("slot_mapping", slot_mapping)):
        check_shape(name, index, (tokens,), "one a token of the query")
        check_index(name, index, torch.int64, query)
