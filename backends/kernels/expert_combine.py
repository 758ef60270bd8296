"""The way back from the experts: each token is the weighted sum of the rows of its choices.

rows [n, hidden], slots and weights [tokens, top_k] -> [tokens, hidden], where token t is
sum over k of weights[t, k] * rows[slots[t, k]], added up in float32 in the order of the choices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backends.kernels.checks import check_float, check_index, check_packed, check_shape


def expert_combine_reference(rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """What `expert_combine` computes, in plain torch, a choice at a time."""
    tokens, top_k = slots.shape
    total = torch.zeros((tokens, rows.shape[1]), dtype=torch.float32, device=rows.device)
    for choice in range(top_k):
        total += weights[:, choice, None] * rows[slots[:, choice].long()].float()
    return total.to(rows.dtype)


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
    return expert_combine_reference(rows, slots, weights)


def _check(rows: Tensor, slots: Tensor, weights: Tensor) -> None:
    check_float("rows", rows)
    check_shape("rows", rows, (None, None), "n, hidden")
    check_packed("rows", rows)
    check_shape("slots", slots, (None, None), "tokens, top_k")
    check_shape("weights", weights, tuple(slots.shape), "the shape of slots")
    for name, index, dtype in (("slots", slots, torch.int32), ("weights", weights, torch.float32)):
        check_index(name, index, dtype, rows)
        check_packed(name, index)
