"""Linear layers whose weight is laid out once for the device that multiplies by it.

On CPUs with oneDNN the weight is packed into its blocked layout, without which every call for a
few rows packs anew: 1.5 to 2.5 times the time at 4 to 32 rows of a 135M model, on one core.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

MIN_ROWS = 4
"""One or two rows take oneDNN longer than four do: fewer are padded to this many."""


class Linear:
    """y = x W^T + b for any number of rows, float32 without TF32."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, pack: bool = True) -> None:
        """Take over weight [outputs, inputs] and bias [outputs]; not packed where `pack` is false.

        A packed product costs some 30 us a call, however small it is.
        """
        self.bias = bias
        self.inputs = weight.shape[1]
        self._packed = _pack(weight) if pack else None
        self._weight = weight if self._packed is None else None

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs [rows, outputs] for x [rows, inputs]."""
        if self._packed is None:
            assert self._weight is not None
            return linear(x, self._weight, self.bias)
        rows = x.shape[0]
        if rows < MIN_ROWS:
            x = torch.cat((x, x.new_zeros(MIN_ROWS - rows, x.shape[1])))
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return y[:rows]


def _pack(weight: Tensor) -> Any:
    """The weight in oneDNN's layout; None where this build, device or dtype has none."""
    packable = weight.device.type == "cpu" and weight.dtype == torch.float32
    if not (packable and torch.backends.mkldnn.is_available()):
        return None
    try:
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 8)
    except (AttributeError, RuntimeError):  # a build without the operator multiplies all the same
        return None
