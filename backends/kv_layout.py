"""How blocks of keys lie in memory. Their shape is always [blocks, block_size, kv_heads, head_dim].

Kernels count slots through that shape, so for them it is also the order in memory. Plain torch on
the CPU gathers: there the heads of a block lie one after the other, [blocks, kv_heads, block_size,
head_dim], so that the tokens of one head in one block are one piece. Measured on contexts that are
not in the processor's cache, gathering pieces of 4 KiB takes half as long as rows of 256 bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backends.kernels.dispatch import IS_INTERPRETED


def uses_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a model on `device` calls the launchers of `backends.kernels`.

    It does on the CPU too in half precision, where their references take care of the rounding.
    """
    return device.type != "cpu" or dtype != torch.float32 or IS_INTERPRETED


def empty_blocks(
    shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """A pool of `shape` [blocks, block_size, kv_heads, head_dim] in the order its readers want."""
    # Zeros, not empty: attention multiplies what it masks by zero, and NaN would survive that.
    if uses_kernels(device, dtype):
        return torch.zeros(shape, device=device, dtype=dtype)
    blocks, block_size, heads, head_dim = shape
    return torch.zeros((blocks, heads, block_size, head_dim), dtype=dtype).transpose(1, 2)


def gather_pieces(pool: Tensor, pieces: Tensor) -> Tensor:
    """Pieces [pieces, block_size * head_dim] of a pool that lies head by head.

    Args:
        pool: [blocks, block_size, kv_heads, head_dim].
        pieces: int64 [pieces], block * kv_heads + head.
    """
    return pool.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, pieces)


def head_rows(slots: Tensor, block_size: int, num_kv_heads: int) -> Tensor:
    """Where the heads of each slot lie in such a pool, int64 [slots * kv_heads]."""
    blocks, offsets = slots // block_size, slots % block_size
    heads = torch.arange(num_kv_heads)
    return ((blocks[:, None] * num_kv_heads + heads) * block_size + offsets[:, None]).flatten()


def scatter_rows(pool: Tensor, rows: Tensor, values: Tensor) -> None:
    """Write `values` [slots, kv_heads, head_dim] to the `rows` that `head_rows` gave."""
    head_dim = values.shape[2]
    pool.transpose(1, 2).view(-1, head_dim).index_copy_(0, rows, values.reshape(-1, head_dim))
