"""Matrix products inside kernels, summed in float32."""

from __future__ import annotations

from backends.kernels.dispatch import IN_INTERPRETER, constexpr, tl, triton


@triton.jit
def dot(left, right):
    """Matrix product in float32, never through TF32."""
    if IN_INTERPRETER:  # it multiplies the bit patterns of bfloat16
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def load_rows(starts, inside, depths, depth):
    """Numbers [rows, depths] of the rows that start there; zero outside, and past `depth`."""
    mask = inside[:, None] & (depths < depth)[None, :]
    return tl.load(starts[:, None] + depths[None, :], mask=mask, other=0.0)


@triton.jit
def multiply_rows(
    left_starts, inside_left, right_starts, inside_right, depth, DEPTH_TILE: constexpr
):
    """Rows [left, depth] times the transpose of rows [right, depth], each given by its start."""
    product = tl.zeros([left_starts.shape[0], right_starts.shape[0]], tl.float32)
    for start in range(0, depth, DEPTH_TILE):
        depths = start + tl.arange(0, DEPTH_TILE)
        left = load_rows(left_starts, inside_left, depths, depth)
        right = load_rows(right_starts, inside_right, depths, depth)
        product += dot(left, tl.trans(right))
    return product
