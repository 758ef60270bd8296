"""One attention from those over parts of the keys, stage 2 of decoding over several instances.

outputs [parts, n, num_heads, head_dim], each normalised within its part, with the log-sum-exp
[parts, n, num_heads] of its scores: the average of the parts weighted by exp(lse) is attention over
all keys (Flash-Decoding, Dao et al., 2023; over instances: LoongServe, section 4.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from backends.kernels.checks import FLOAT_DTYPES, check_index, check_packed, check_shape
from backends.kernels.dispatch import HAS_TRITON, constexpr, runs_triton, tl, triton
from backends.kernels.online_softmax import LOG2_E

PART_TILE = 8
"""Parts that a program loads at once."""
TO_LOG2: Any = tl.constexpr(LOG2_E) if HAS_TRITON else LOG2_E
"""LOG2_E inside a kernel, where a global must be a compile-time constant."""


def merge_parts_reference(outputs: Tensor, lses: Tensor, dtype: torch.dtype) -> Tensor:
    """What `merge_parts` computes, in plain torch."""
    peak = lses.amax(0)
    weights = (lses - peak.masked_fill(peak == -torch.inf, 0.0)).exp_()
    total = weights.sum(0)
    weights.div_(total.masked_fill_(total == 0.0, 1.0))
    # What an ignored part holds may not even be a number.
    ignored = (weights == 0.0)[..., None]
    return (outputs * weights[..., None]).masked_fill_(ignored, 0.0).sum(0).to(dtype)


@triton.jit
def merge_row(  # noqa: PLR0913, PLR0917
    partial_pointer,
    lse_pointer,
    parts,
    partial_stride,
    lse_stride,
    HEAD_DIM: constexpr,
    DIM_TILE: constexpr,
    PARTS_TILE: constexpr,
):
    """Average [dim] of the parts of one query and head, and the log-sum-exp of all."""
    dims = tl.arange(0, DIM_TILE)
    peak = tl.full([1], -1e30, tl.float32)  # finite, or parts of -inf alone would make NaN
    total = tl.zeros([1], tl.float32)
    merged = tl.zeros([DIM_TILE], tl.float32)
    for first in range(0, parts, PARTS_TILE):
        part = (first + tl.arange(0, PARTS_TILE)).to(tl.int64)
        inside = part < parts
        lse = tl.load(lse_pointer + part * lse_stride, mask=inside, other=float("-inf"))
        lse = lse * TO_LOG2
        new_peak = tl.maximum(peak, tl.max(lse, 0))
        weights, shrink = tl.exp2(lse - new_peak), tl.exp2(peak - new_peak)
        mask = (lse > float("-inf"))[:, None] & (dims < HEAD_DIM)[None, :]
        places = (part * partial_stride)[:, None] + dims[None, :]
        partial = tl.load(partial_pointer + places, mask=mask, other=0.0)
        total = total * shrink + tl.sum(weights, 0)
        merged = merged * shrink + tl.sum(partial * weights[:, None], 0)
        peak = new_peak
    divisor = tl.where(total == 0.0, 1.0, total)
    lse = tl.where(total == 0.0, float("-inf"), (peak + tl.log2(divisor)) / TO_LOG2)
    return merged / divisor, lse


# All change from batch to batch; Triton would compile anew for 1 and for multiples of 16.
@triton.jit(do_not_specialize=["parts", "partial_stride", "lse_stride"])
def merge_parts_kernel(  # noqa: PLR0913, PLR0917
    partial_pointer,
    lse_pointer,
    output_pointer,
    parts,
    partial_stride,
    lse_stride,
    HEAD_DIM: constexpr,
    DIM_TILE: constexpr,
    PARTS_TILE: constexpr,
):
    """One program a query and head."""
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, DIM_TILE)
    merged, _ = merge_row(
        partial_pointer + row * HEAD_DIM,
        lse_pointer + row,
        parts,
        partial_stride,
        lse_stride,
        HEAD_DIM,
        DIM_TILE,
        PARTS_TILE,
    )
    result = merged.to(output_pointer.dtype.element_ty)
    tl.store(output_pointer + row * HEAD_DIM + dims, result, mask=dims < HEAD_DIM)


def merge_parts(outputs: Tensor, lses: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Attention over all keys from attention over parts of them.

    Args:
        outputs: float32 [parts, n, num_heads, head_dim], at least one part.
        lses: float32 [parts, n, num_heads], natural logarithm; -inf: the part is not read.
        dtype: of what comes back, float32, float16 or bfloat16.

    Returns:
        [n, num_heads, head_dim]; zeros where every part is to be ignored.
    """
    _check(outputs, lses, dtype)
    if not runs_triton(outputs):
        return merge_parts_reference(outputs, lses, dtype)
    parts, n, num_heads, head_dim = outputs.shape
    merged = torch.empty((n, num_heads, head_dim), dtype=dtype, device=outputs.device)
    if merged.numel():
        merge_parts_kernel[(n * num_heads,)](
            *(outputs, lses, merged, parts, outputs.stride(0), lses.stride(0)),
            HEAD_DIM=head_dim,
            DIM_TILE=triton.next_power_of_2(head_dim),
            PARTS_TILE=PART_TILE,
            num_warps=2,
        )
    return merged


def _check(outputs: Tensor, lses: Tensor, dtype: torch.dtype) -> None:
    check_shape("outputs", outputs, (None,) * 4, "parts, n, num_heads, head_dim")
    check_shape("lses", lses, tuple(outputs.shape[:3]), "parts, n, num_heads of outputs")
    for name, tensor in (("outputs", outputs), ("lses", lses)):
        check_index(name, tensor, torch.float32, outputs)
        check_packed(name, tensor)
    if outputs.shape[0] == 0:
        raise ValueError("outputs has 0 parts and must have at least 1; stack those of the group")
    if dtype not in FLOAT_DTYPES:
        names = ", ".join(str(known) for known in FLOAT_DTYPES)
        raise ValueError(f"dtype={dtype} must be one of {names}")
