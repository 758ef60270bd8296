"""Weights by name, put on the device that computes with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from backends.experts import Experts, Gate, Mixture, SharedExpert
from backends.linear import Linear
from backends.mlp import Mlp
from backends.model_tensors import down_name, gate_name, gate_up_name
from sim.models.architecture import Architecture


class Placer:
    """Takes weights by name and puts them on the device, several as one where they are fused."""

    def __init__(
        self, weights: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
    ) -> None:
        """Read from `weights`, and give them the device and the dtype that they are used in."""
        self._weights, self._device, self._dtype = weights, device, dtype

    def __call__(self, name: str) -> Tensor:
        """The tensor `name`."""
        return self._weights[name].to(self._device, self._dtype)

    def maybe(self, name: str) -> Tensor | None:
        """None where this rank's share lacks it."""
        return self(name) if name in self._weights else None

    def linear(self, *names: str) -> Linear:
        """One linear layer that computes those of `names` side by side."""
        weight = torch.cat([self(f"{name}.weight") for name in names])
        biases = [self(f"{name}.bias") for name in names if f"{name}.bias" in self._weights]
        return Linear(weight, torch.cat(biases) if biases else None)

    def mlp(self, prefix: str) -> Mlp:
        """The SwiGLU network whose tensors begin with `prefix`."""
        gate_up = self.linear(f"{prefix}gate_proj", f"{prefix}up_proj")
        return Mlp(gate_up, self.linear(f"{prefix}down_proj"))

    def experts(self, layer: int, expert_ids: Sequence[int] | None = None) -> Experts:
        """The chosen experts of a layer, None for all. The others are not put on the device.

        Raises:
            ValueError: no expert, or one that the layer does not have.
        """
        gate_up, down = (self._weights[name(layer)] for name in (gate_up_name, down_name))
        return Experts(gate_up, down, expert_ids, self._device, self._dtype)

    def mixture(self, config: Architecture, layer: int, with_experts: bool) -> Mixture:
        """What a sparse layer has in place of its MLP."""
        weight = self(gate_name(layer))
        gate = Gate(weight, config.experts_per_token, config.renormalise_top_k)
        shared, prefix = None, f"model.layers.{layer}.mlp.shared_expert"
        if config.shared_expert_intermediate_size:
            shared = SharedExpert(self.mlp(f"{prefix}."), self.linear(f"{prefix}_gate"))
        return Mixture(gate, self.experts(layer) if with_experts else None, shared)
