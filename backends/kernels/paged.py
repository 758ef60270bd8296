"""The paged KV cache as every operator sees it, and the refusals that go with it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backends.kernels.checks import (
    check_float,
    check_index,
    check_like,
    check_packed,
    check_shape,
)


class KvCache(NamedTuple):
    """Keys and values of one layer; token i of sequence s is in block_tables[s, i // block_size].

    A *slot* numbers the tokens of the pool: `block * block_size + offset`.
    """

    key: Tensor
    """[num_blocks, block_size, num_kv_heads, head_dim], contiguous"""
    value: Tensor
    """the same shape and dtype as `key`"""


def check_cache(cache: KvCache, query: Tensor) -> None:
    """Refuse a cache that does not fit `query` [tokens, num_heads, head_dim]."""
    check_float("query", query)
    check_shape("query", query, (None, None, None), "tokens, num_heads, head_dim")
    check_packed("query", query)
    head_dim = query.shape[2]
    rule = f"num_blocks, block_size, num_kv_heads, head_dim={head_dim} of the query"
    check_shape("cache.key", cache.key, (None, None, None, head_dim), rule)
    check_shape("cache.value", cache.value, tuple(cache.key.shape), "the shape of cache.key")
    for name, tensor in (("cache.key", cache.key), ("cache.value", cache.value)):
        check_like(name, tensor, "query", query)
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name}.stride()={tensor.stride()} must be contiguous, because slots are "
                "counted through it; allocate one tensor a layer"
            )
    num_heads, num_kv_heads = query.shape[1], cache.key.shape[2]
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_kv_heads={num_kv_heads} must divide num_heads={num_heads}; "
            "check the model's configuration or its tensor-parallel split"
        )


def check_paging(
    query: Tensor, cache: KvCache, block_tables: Tensor, context_lengths: Tensor
) -> None:
    """Refuse tables [num_sequences, max_blocks] and lengths [num_sequences] that do not fit."""
    check_cache(cache, query)
    check_shape("context_lengths", context_lengths, (None,), "one length a sequence")
    num_sequences = context_lengths.shape[0]
    check_shape("block_tables", block_tables, (num_sequences, None), "num_sequences, max_blocks")
    check_index("context_lengths", context_lengths, torch.int32, query)
    check_index("block_tables", block_tables, torch.int32, query)
    check_packed("block_tables", block_tables)
    check_packed("context_lengths", context_lengths)


def context_slots(
    block_tables: Tensor, context_lengths: Tensor, max_context: int, block_size: int
) -> Tensor:
    """Slot of each token of each context, padded to `max_context` tokens.

    Padding repeats the last token of its sequence: a slot that was written, so what is masked
    later is at least finite, and an unused table entry is never read.

    Args:
        block_tables: int32 [num_sequences, max_blocks].
        context_lengths: int32 [num_sequences]; slots of an empty context are all 0.
        max_context: tokens to return, at least 1.
        block_size: tokens a block.

    Returns:
        int64 [num_sequences, max_context].
    """
    lengths = context_lengths.long()[:, None]
    tokens = torch.arange(max_context, device=block_tables.device)[None, :]
    tokens = torch.minimum(tokens, (lengths - 1).clamp(min=0))
    blocks = block_tables.gather(1, tokens // block_size).long()
    return (blocks * block_size + tokens % block_size).masked_fill_(lengths == 0, 0)


def tile_sizes(head_dim: int, element_size: int) -> tuple[int, int]:
    """Tile of head dimensions and of tokens whose keys and values fit shared memory twice.

    `tl.dot` wants powers of two of at least 16. 16 KiB a tile keeps several programs on a
    multiprocessor, and float32, which is multiplied without tensor cores, out of local memory.
    """
    dim_tile = max(16, 1 << (head_dim - 1).bit_length())
    return dim_tile, max(16, min(64, 16384 // (dim_tile * element_size)))
