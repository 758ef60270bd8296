"""Where an operator runs: its Triton kernel on CUDA tensors, its torch reference elsewhere."""

from __future__ import annotations

import os
import warnings
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import Tensor

# Kernels compare with their reference within a stated tolerance, fused multiply-add or not.
warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION is unset")


def _load_triton() -> tuple[Any, Any]:
    try:
        import triton
        import triton.language
    except ModuleNotFoundError:  # no wheel for macOS and Windows: `jit` must still decorate
        return SimpleNamespace(jit=_undecorated), None
    return triton, triton.language


def _undecorated(function: Any = None, **options: object) -> Any:
    """`triton.jit` where there is no Triton, with options or without."""
    return partial(_undecorated, **options) if function is None else function


triton, tl = _load_triton()
HAS_TRITON = tl is not None
if TYPE_CHECKING:
    constexpr = Any  # a checker cannot take an annotation from a module that may be absent
else:
    constexpr = tl.constexpr if HAS_TRITON else Any
# Triton reads this when it decorates a kernel, so a later change has no effect on either.
IS_INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
IN_INTERPRETER: Any = tl.constexpr(IS_INTERPRETED) if HAS_TRITON else IS_INTERPRETED
"""The same inside a kernel, where a global must be a compile-time constant."""


def runs_triton(tensor: Tensor) -> bool:
    """Whether operators on `tensor` run as Triton kernels; TRITON_INTERPRET=1 says so on CPU."""
    if tensor.is_cuda and not HAS_TRITON:
        warnings.warn(
            f"tensor on {tensor.device} but triton is not installed: the torch reference runs "
            "instead of the kernel, slower; install triton or use device=cpu",
            stacklevel=3,
        )
    return IS_INTERPRETED or (tensor.is_cuda and HAS_TRITON)
