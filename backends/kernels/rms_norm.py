"""Root-mean-square norm over the last dimension, alone or fused with the residual addition.

x [tokens, hidden] -> x / sqrt(mean(x^2) + eps) * weight. Sums are float32; the normalised row is
rounded to x's dtype before the weight, as Hugging Face's LlamaRMSNorm does.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from backends.kernels.checks import check_float, check_like, check_packed, check_shape
from backends.kernels.dispatch import constexpr, runs_triton, tl, triton


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """What `rms_norm` computes, in plain torch."""
    summed = x if residual is None else x + residual
    wide = summed.float()
    inverse_rms = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = (wide * inverse_rms).to(x.dtype) * weight
    return normed if residual is None else (normed, summed)


@triton.jit
def rms_norm_kernel(  # noqa: PLR0913, PLR0917
    x_pointer,
    residual_pointer,
    weight_pointer,
    normed_pointer,
    summed_pointer,
    x_stride,
    residual_stride,
    hidden,
    eps,
    HAS_RESIDUAL: constexpr,
    HIDDEN_TILE: constexpr,
):
    """One program a row; the row stays in registers between the two passes over it."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, HIDDEN_TILE)
    inside = columns < hidden
    x = tl.load(x_pointer + row * x_stride + columns, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        residual_row = residual_pointer + row * residual_stride
        residual = tl.load(residual_row + columns, mask=inside, other=0.0)
        # Rounded like the stored sum: the next layer adds to what was stored.
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(summed_pointer + row * hidden + columns, x, mask=inside)
    wide = x.to(tl.float32)
    inverse_rms = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / hidden + eps)
    normed = (wide * inverse_rms).to(x.dtype).to(tl.float32)
    weight = tl.load(weight_pointer + columns, mask=inside, other=0.0).to(tl.float32)
    result = (normed * weight).to(x.dtype)
    tl.store(normed_pointer + row * hidden + columns, result, mask=inside)


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Norm of `x`, or of `x + residual` together with that sum; inputs are left as they are.

    Args:
        x: [tokens, hidden], rows dense, the row stride free.
        weight: [hidden], x's dtype.
        eps: added to the mean square.
        residual: [tokens, hidden] or None.

    Returns:
        The norm [tokens, hidden]; with a residual the pair (norm, x + residual).
    """
    _check(x, weight, residual)
    if not runs_triton(x):
        return rms_norm_reference(x, weight, eps, residual)
    tokens, hidden = x.shape
    normed = torch.empty((tokens, hidden), dtype=x.dtype, device=x.device)
    summed = normed if residual is None else torch.empty_like(normed)
    other = x if residual is None else residual
    hidden_tile = triton.next_power_of_2(hidden)
    if tokens:
        rms_norm_kernel[(tokens,)](
            *(x, other, weight, normed, summed, x.stride(0), other.stride(0), hidden, eps),
            HAS_RESIDUAL=residual is not None,
            HIDDEN_TILE=hidden_tile,
            num_warps=4 if hidden_tile <= 2048 else 8,
        )
    return normed if residual is None else (normed, summed)


def _check(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    check_float("x", x)
    check_shape("x", x, (None, None), "tokens, hidden; flatten leading dimensions first")
    check_packed("x", x)
    check_shape("weight", weight, (x.shape[1],), "hidden of x")
    check_like("weight", weight, "x", x)
    if residual is not None:
        check_shape("residual", residual, tuple(x.shape), "the shape of x")
        check_like("residual", residual, "x", x)
        check_packed("residual", residual)
