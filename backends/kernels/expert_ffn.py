"""The experts of a mixture: a SwiGLU network for each group of rows, as two grouped products.

rows [n, hidden], sorted by expert; expert e owns the next counts[e] of them. Its gate and up
projections are gate_up[e] [2 * inner, hidden], gate first, its way back is down[e] [hidden, inner]:
(silu(x Wg^T) * (x Wu^T)) Wd^T -> [n, hidden]. Sums are float32; what lies between the two
products [n, inner] is rounded to the dtype of the rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from backends.kernels.checks import (
    check_float,
    check_index,
    check_like,
    check_packed,
    check_shape,
)
from backends.kernels.dispatch import constexpr, runs_triton, tl, triton
from backends.kernels.products import dot, load_rows, multiply_rows

MOST_EXPERTS = 1024
"""Every program looks for its expert among all counts at once."""


def expert_ffn_reference(rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """What `expert_ffn` computes, in plain torch, an expert at a time."""
    sizes = counts.tolist()
    if min(sizes) < 0:
        raise ValueError(f"counts={sizes} must not be negative; pass the counts of a gate")
    if sum(sizes) != len(rows):
        raise ValueError(
            f"counts sum to {sum(sizes)} and must sum to the {len(rows)} rows; "
            "pass the rows and the counts of one gate"
        )
    output = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    start = 0
    for expert, size in enumerate(sizes):
        end = start + size
        if size:
            gate, up = linear(rows[start:end], gate_up[expert]).chunk(2, dim=-1)
            output[start:end] = linear(silu(gate) * up, down[expert])
        start = end
    return output


@triton.jit
def rows_of_tile(tile, counts_pointer, experts, ROW_TILE: constexpr, EXPERT_TILE: constexpr):
    """Expert of a tile of rows, the first row of the tile, and the end of the expert's rows.

    Tiles are counted through the experts, each expert's last one partly filled; a tile past the
    last expert starts at or after its end.
    """
    ids = tl.arange(0, EXPERT_TILE)
    counts = tl.load(counts_pointer + ids, mask=ids < experts, other=0)
    tiles = tl.cdiv(counts, ROW_TILE)
    last_tiles, last_rows = tl.cumsum(tiles, 0), tl.cumsum(counts, 0)
    expert = tl.sum((last_tiles <= tile).to(tl.int32), 0)
    is_expert = ids == expert
    first_tile = tl.sum(tl.where(is_expert, last_tiles - tiles, 0), 0)
    first_row = tl.sum(tl.where(is_expert, last_rows - counts, 0), 0)
    end = tl.sum(tl.where(is_expert, last_rows, 0), 0)
    return expert.to(tl.int64), first_row + (tile - first_tile) * ROW_TILE, end


@triton.jit
def swiglu_kernel(  # noqa: PLR0913, PLR0917
    rows_pointer,
    gate_up_pointer,
    counts_pointer,
    activated_pointer,
    rows_stride,
    gate_up_stride,
    experts,
    hidden,
    inner,
    ROW_TILE: constexpr,
    COLUMN_TILE: constexpr,
    DEPTH_TILE: constexpr,
    EXPERT_TILE: constexpr,
):
    """One program a tile of one expert's rows and of its inner columns."""
    expert, first, end = rows_of_tile(
        tl.program_id(0), counts_pointer, experts, ROW_TILE, EXPERT_TILE
    )
    if first >= end:
        return
    rows = (first + tl.arange(0, ROW_TILE)).to(tl.int64)
    columns = (tl.program_id(1) * COLUMN_TILE + tl.arange(0, COLUMN_TILE)).to(tl.int64)
    inside, inside_column = rows < end, columns < inner
    starts = rows_pointer + rows * rows_stride
    gate_starts = gate_up_pointer + expert * gate_up_stride + columns * hidden
    up_starts = gate_up_pointer + expert * gate_up_stride + (inner + columns) * hidden
    gate = tl.zeros([ROW_TILE, COLUMN_TILE], tl.float32)
    up = tl.zeros([ROW_TILE, COLUMN_TILE], tl.float32)
    for start in range(0, hidden, DEPTH_TILE):
        depths = start + tl.arange(0, DEPTH_TILE)
        left = load_rows(starts, inside, depths, hidden)
        gate += dot(left, tl.trans(load_rows(gate_starts, inside_column, depths, hidden)))
        up += dot(left, tl.trans(load_rows(up_starts, inside_column, depths, hidden)))
    activated = gate * tl.sigmoid(gate) * up
    places = activated_pointer + rows[:, None] * inner + columns[None, :]
    mask = inside[:, None] & inside_column[None, :]
    tl.store(places, activated.to(activated_pointer.dtype.element_ty), mask=mask)


@triton.jit
def grouped_product_kernel(  # noqa: PLR0913, PLR0917
    rows_pointer,
    down_pointer,
    counts_pointer,
    output_pointer,
    down_stride,
    experts,
    inner,
    hidden,
    ROW_TILE: constexpr,
    COLUMN_TILE: constexpr,
    DEPTH_TILE: constexpr,
    EXPERT_TILE: constexpr,
):
    """One program a tile of one expert's rows and of the columns that they become."""
    expert, first, end = rows_of_tile(
        tl.program_id(0), counts_pointer, experts, ROW_TILE, EXPERT_TILE
    )
    if first >= end:
        return
    rows = (first + tl.arange(0, ROW_TILE)).to(tl.int64)
    columns = (tl.program_id(1) * COLUMN_TILE + tl.arange(0, COLUMN_TILE)).to(tl.int64)
    inside, inside_column = rows < end, columns < hidden
    starts = rows_pointer + rows * inner
    down_starts = down_pointer + expert * down_stride + columns * inner
    product = multiply_rows(starts, inside, down_starts, inside_column, inner, DEPTH_TILE)
    places = output_pointer + rows[:, None] * hidden + columns[None, :]
    mask = inside[:, None] & inside_column[None, :]
    tl.store(places, product.to(output_pointer.dtype.element_ty), mask=mask)


def expert_ffn(rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Each row through the SwiGLU network of its expert; nothing is read back to the host.

    Args:
        rows: [n, hidden], sorted by expert, rows dense, the row stride free; none is allowed.
        counts: int32 [experts], rows of each expert; they sum to n (the kernels do not check it:
            a check would stall the GPU).
        gate_up: [experts, 2 * inner, hidden], gate before up; each expert dense.
        down: [experts, hidden, inner]; each expert dense.

    Returns:
        [n, hidden].
    """
    _check(rows, counts, gate_up, down)
    if not runs_triton(rows):
        return expert_ffn_reference(rows, counts, gate_up, down)
    (n, hidden), experts, inner = rows.shape, counts.shape[0], down.shape[2]
    activated = torch.empty((n, inner), dtype=rows.dtype, device=rows.device)
    output = torch.empty((n, hidden), dtype=rows.dtype, device=rows.device)
    if n == 0:
        return output
    tiles = ffn_tiles(n, experts, rows.element_size())
    # Counts stay on the GPU: at most this many tiles, were every expert's last one to hold a row.
    busy = min(n, experts)
    row_tiles = (n - busy) // tiles["ROW_TILE"] + busy
    options = tiles | {"num_warps": ffn_warps(tiles["ROW_TILE"]), "num_stages": 3}
    swiglu_kernel[(row_tiles, triton.cdiv(inner, tiles["COLUMN_TILE"]))](
        *(rows, gate_up, counts, activated),
        *(rows.stride(0), gate_up.stride(0), experts, hidden, inner),
        **options,
    )
    grouped_product_kernel[(row_tiles, triton.cdiv(hidden, tiles["COLUMN_TILE"]))](
        *(activated, down, counts, output, down.stride(0), experts, inner, hidden),
        **options,
    )
    return output


def ffn_tiles(n: int, experts: int, element_size: int) -> dict[str, int]:
    """Tiles of both products: as many rows as an even routing gives an expert, within bounds.

    Larger ones would mostly be padding, smaller ones would read the weights more often. float32,
    which is multiplied without tensor cores, keeps out of local memory by tiles of 32.
    """
    even_rows = 1 << (max(1, -(-n // experts)) - 1).bit_length()
    wide = element_size == 2
    return {
        "ROW_TILE": max(16, min(even_rows, 128 if wide else 32)),
        "COLUMN_TILE": 64 if wide else 32,
        "DEPTH_TILE": 64 if wide else 32,
        "EXPERT_TILE": 1 << (experts - 1).bit_length(),
    }


def ffn_warps(row_tile: int) -> int:
    """Warps a program, so that the sums of a tile of rows fit their registers."""
    return 8 if row_tile > 64 else 4


def _check(rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> None:
    check_float("rows", rows)
    check_shape("rows", rows, (None, None), "n, hidden")
    check_packed("rows", rows)
    check_shape("counts", counts, (None,), "one an expert")
    check_index("counts", counts, torch.int32, rows)
    check_packed("counts", counts)
    experts, hidden = counts.shape[0], rows.shape[1]
    if not 1 <= experts <= MOST_EXPERTS:
        raise ValueError(
            f"counts has {experts} experts and must have 1 to {MOST_EXPERTS}: a program looks at "
            "all counts at once; call once for each group of experts"
        )
    check_shape("gate_up", gate_up, (experts, None, hidden), "experts, 2 * inner, hidden")
    if gate_up.shape[1] % 2:
        raise ValueError(
            f"gate_up.shape={list(gate_up.shape)} must have an even second size, gate rows and as "
            "many up rows; concatenate both projections"
        )
    inner = gate_up.shape[1] // 2
    check_shape("down", down, (experts, hidden, inner), "experts, hidden, inner of gate_up")
    for name, weight in (("gate_up", gate_up), ("down", down)):
        check_like(name, weight, "rows", rows)
        check_packed(name, weight)
