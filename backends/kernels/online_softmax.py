"""Softmax over keys that arrive tile by tile, in base 2, as both attention kernels use it.

Online softmax: Milakov and Gimelshein (2018); tiling: FlashAttention (Dao et al., 2022).
"""

from __future__ import annotations

from backends.kernels.dispatch import constexpr, tl, triton
from backends.kernels.products import dot

LOG2_E = 1.4426950408889634
"""Kernels multiply scores by it and use exp2, which the hardware has."""


@triton.jit
def gather_slots(table_pointer, tokens, inside, BLOCK_SIZE: constexpr):
    """Slots int64 [tokens] of the tokens of one sequence; those outside get slot 0 of block 0."""
    blocks = tl.load(table_pointer + tokens // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
    return blocks * BLOCK_SIZE + tokens % BLOCK_SIZE


@triton.jit
def absorb_tile(scores, value, running_max, running_sum, accumulated):
    """Fold one tile of scores [rows, tokens] and values [tokens, dim] into the running state.

    Every row must have seen a finite score by now, or -inf minus -inf makes it NaN.
    """
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    weights = tl.exp2(scores - new_max[:, None])
    shrink = tl.exp2(running_max - new_max)
    running_sum = running_sum * shrink + tl.sum(weights, 1)
    weighted = dot(weights.to(value.dtype), value)
    return new_max, running_sum, accumulated * shrink[:, None] + weighted


# num_splits changes from batch to batch; Triton would compile anew for 1 and for multiples of 16.
@triton.jit(do_not_specialize=["num_splits"])
def merge_splits_kernel(  # noqa: PLR0913, PLR0917
    partial_pointer,
    lse_pointer,
    output_pointer,
    num_splits,
    HEAD_DIM: constexpr,
    DIM_TILE: constexpr,
    SPLIT_TILE: constexpr,
):
    """One program a sequence and head: the average of its splits, weighted by 2 ** lse."""
    row = tl.program_id(0).to(tl.int64)
    splits, dims = tl.arange(0, SPLIT_TILE), tl.arange(0, DIM_TILE)
    inside, inside_dim = splits < num_splits, dims < HEAD_DIM
    lse = tl.load(lse_pointer + row * num_splits + splits, mask=inside, other=float("-inf"))
    peak = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(peak == float("-inf"), 0.0, peak))
    total = tl.sum(weights, 0)
    places = (row * num_splits + splits)[:, None] * HEAD_DIM + dims[None, :]
    mask = inside[:, None] & inside_dim[None, :]
    partial = tl.load(partial_pointer + places, mask=mask, other=0.0)
    merged = tl.sum(partial * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    result = merged.to(output_pointer.dtype.element_ty)
    tl.store(output_pointer + row * HEAD_DIM + dims, result, mask=inside_dim)
