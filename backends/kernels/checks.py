"""Refusals shared by the operators: the value, the rule, the way out. No data is read."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...], rule: str) -> None:
    """Refuse a tensor whose shape is not `shape`; None stands for any size."""
    sizes_agree = tensor.ndim == len(shape) and all(
        wanted in (None, size) for size, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not sizes_agree:
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}.shape={list(tensor.shape)} must be [{wanted}]: {rule}")


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse a tensor of another dtype or device than `other`."""
    if tensor.dtype != other.dtype:
        raise ValueError(
            f"{name}.dtype={tensor.dtype} must equal {other_name}.dtype={other.dtype}; "
            f"cast one with .to(...)"
        )
    if tensor.device != other.device:
        raise ValueError(
            f"{name}.device={tensor.device} must equal {other_name}.device={other.device}; "
            f"move one with .to(...)"
        )


def check_float(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that is not float32, float16 or bfloat16."""
    if tensor.dtype not in FLOAT_DTYPES:
        names = ", ".join(str(dtype) for dtype in FLOAT_DTYPES)
        raise ValueError(f"{name}.dtype={tensor.dtype} must be one of {names}; cast it first")


def check_index(name: str, tensor: Tensor, dtype: torch.dtype, other: Tensor) -> None:
    """Refuse an index tensor of another dtype, or on another device than `other`."""
    if tensor.dtype != dtype:
        raise ValueError(f"{name}.dtype={tensor.dtype} must be {dtype}; use .to({dtype})")
    if tensor.device != other.device:
        raise ValueError(
            f"{name}.device={tensor.device} must be {other.device}, where the data is; "
            f"use .to({str(other.device)!r})"
        )


def check_packed(name: str, tensor: Tensor) -> None:
    """Refuse rows that are not dense; the first dimension may be strided, as in fused QKV."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            raise ValueError(
                f"{name}.stride()={tensor.stride()} must be dense after the first dimension; "
                f"pass {name}.contiguous()"
            )
        expected *= size
