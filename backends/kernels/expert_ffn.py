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

MOST_EXPERTS = 1024
"""Every program looks for its expert among all counts at once."""


def expert_ffn_reference(rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """What `expert_ffn` computes, in plain torch, an expert at a time."""
    sizes = counts.tolist()
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
    return expert_ffn_reference(rows, counts, gate_up, down)


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
