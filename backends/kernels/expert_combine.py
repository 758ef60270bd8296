"""The way back from the experts: each token is the weighted sum of the rows of its choices.

rows [n, hidden], slots and weights [tokens, top_k] -> [tokens, hidden], where token t is
sum over k of weights[t, k] * rows[slots[t, k]], added up in float32 in the order of the choices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backends.kernels.checks import check_float, check_index, check_packed, check_shape
from backends.kernels.dispatch import constexpr, runs_triton, tl, triton


def expert_combine_reference(rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """What `expert_combine` computes, in plain torch, a choice at a time."""
    tokens, top_k = slots.shape
    total = torch.zeros((tokens, rows.shape[1]), dtype=torch.float32, device=rows.device)
    for choice in range(top_k):
        total += weights[:, choice, None] * rows[slots[:, choice].long()].float()
    return total.to(rows.dtype)


@triton.jit
def expert_combine_kernel(  # noqa: PLR0913, PLR0917
    rows_pointer,
    slots_pointer,
    weights_pointer,
    output_pointer,
    rows_stride,
    slots_stride,
    weights_stride,
    hidden,
    TOP_K: constexpr,
    HIDDEN_TILE: constexpr,
):
    """One program a token and tile of its row."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * HIDDEN_TILE + tl.arange(0, HIDDEN_TILE)
    inside = columns < hidden
    total = tl.zeros([HIDDEN_TILE], tl.float32)
    for choice in range(TOP_K):
        slot = tl.load(slots_pointer + token * slots_stride + choice).to(tl.int64)
        weight = tl.load(weights_pointer + token * weights_stride + choice)
        row = tl.load(rows_pointer + slot * rows_stride + columns, mask=inside, other=0.0)
        total += weight * row.to(tl.float32)
    result = total.to(output_pointer.dtype.element_ty)
    tl.store(output_pointer + token * hidden + columns, result, mask=inside)


def expert_combine(rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the rows of each token's choices.

    Args:
        rows: [n, hidden], what the experts made, rows dense, the row stride free.
        slots: int32 [tokens, top_k], each below n (unchecked: a check would stall the GPU).
        weights: float32 [tokens, top_k].

    Returns:
        [tokens, hidden] in the dtype of the rows.
    """
    _check(rows, slots, weights)
    if not runs_triton(rows):
        return expert_combine_reference(rows, slots, weights)
    (tokens, top_k), hidden = slots.shape, rows.shape[1]
    output = torch.empty((tokens, hidden), dtype=rows.dtype, device=rows.device)
    hidden_tile = min(1024, triton.next_power_of_2(hidden))
    if tokens:
        expert_combine_kernel[(tokens, triton.cdiv(hidden, hidden_tile))](
            *(rows, slots, weights, output),
            *(rows.stride(0), slots.stride(0), weights.stride(0), hidden),
            TOP_K=top_k,
            HIDDEN_TILE=hidden_tile,
            num_warps=4,
        )
    return output


def _check(rows: Tensor, slots: Tensor, weights: Tensor) -> None:
    check_float("rows", rows)
    check_shape("rows", rows, (None, None), "n, hidden")
    check_packed("rows", rows)
    check_shape("slots", slots, (None, None), "tokens, top_k")
    check_shape("weights", weights, tuple(slots.shape), "the shape of slots")
    for name, index, dtype in (("slots", slots, torch.int32), ("weights", weights, torch.float32)):
        check_index(name, index, dtype, rows)
        check_packed(name, index)
