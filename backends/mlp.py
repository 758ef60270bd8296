"""The SwiGLU network of a layer, or of one expert of it."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu

from backends.linear import Linear


class Mlp:
    """down(silu(gate(x)) * up(x)), gate and up as one product."""

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        """Take over its products; the outputs of `gate_up` are the gate's, then as many of up."""
        self._gate_up, self._down = gate_up, down

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Its matrix products."""
        return self._gate_up, self._down

    @property
    def expert_linears(self) -> tuple[Linear, ...]:
        """As of a mixture: there are none."""
        return ()

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs [rows, hidden] for x [rows, hidden]."""
        gate, up = self._gate_up(x).chunk(2, -1)
        return self._down(silu(gate).mul_(up))
