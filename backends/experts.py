"""The mixture of experts of a layer, in parts that may lie on different ranks.

A gate routes tokens, each expert computes the rows that are sorted together for it, and what comes
back is summed up for each token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backends.kernels.expert_combine import expert_combine
from backends.kernels.expert_ffn import expert_ffn
from backends.kernels.expert_gate import Routed, expert_gate, scatter_rows
from backends.kv_layout import uses_kernels
from backends.linear import Linear
from backends.mlp import Mlp

MIN_PACKED = 2**18
"""Elements from which a matrix of an expert is packed; with few rows, smaller ones take longer."""


class Gate:
    """A layer's router."""

    def __init__(self, weight: Tensor, top_k: int, renormalise: bool) -> None:
        """Take over weight [experts, hidden]; see `expert_gate` for the rest."""
        self._weight, self._top_k, self._renormalise = weight, top_k, renormalise

    def __call__(self, hidden: Tensor) -> Routed:
        """The experts of each token of hidden [tokens, hidden]."""
        return expert_gate(hidden, self._weight, self._top_k, self._renormalise)


class Experts:
    """Some or all experts of one layer."""

    def __init__(
        self,
        gate_up: Tensor,
        down: Tensor,
        expert_ids: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Lay out the chosen experts, and no others, on a device.

        On CPUs in float32 each expert is called by itself, elsewhere a kernel computes all of them.

        Args:
            gate_up: of all experts of the layer [experts, 2 * inner, hidden], gate before up.
            down: of all [experts, hidden, inner].
            expert_ids: which of them are here, in the order of their rows; None: all.
            device: None: that of the weights.
            dtype: None: that of the weights.

        Raises:
            ValueError: no expert, or one that the layer does not have.
        """
        total = len(gate_up)
        self.expert_ids = tuple(range(total) if expert_ids is None else expert_ids)
        """The experts here, in the order of their rows."""
        if not self.expert_ids or not all(0 <= one < total for one in self.expert_ids):
            raise ValueError(
                f"expert_ids={self.expert_ids} must name at least one expert, each of 0 to "
                f"{total - 1}, which the layer has"
            )
        device, dtype = torch.device(device or gate_up.device), dtype or gate_up.dtype
        chosen = [_chosen(weight, self.expert_ids).to(device, dtype) for weight in (gate_up, down)]
        self._mlps: list[Mlp] = []
        if uses_kernels(device, dtype):
            self._gate_up, self._down = chosen
        else:
            self._mlps = [Mlp(*map(_linear, pair)) for pair in zip(*chosen, strict=True)]

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The products of one expert; none where a kernel computes all of them."""
        return self._mlps[0].linears if self._mlps else ()

    def __call__(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Each row through its expert.

        Args:
            rows: [n, hidden], sorted by expert in the order of `expert_ids`.
            counts: int32 [experts here], rows of each; they sum to n.

        Returns:
            [n, hidden], in the same order.

        Raises:
            ValueError: counts of other experts, or of other rows.
        """
        if not self._mlps:
            return expert_ffn(rows, counts, self._gate_up, self._down)
        sizes = counts.tolist()
        if len(sizes) != len(self._mlps) or sum(sizes) != len(rows):
            raise ValueError(
                f"counts={sizes} must give the rows of {len(self._mlps)} experts and sum to the "
                f"{len(rows)} rows; pass the rows and counts of one gate, of these experts alone"
            )
        parts = zip(self._mlps, rows.split(sizes), strict=True)
        computed = [mlp(part) for mlp, part in parts if len(part)]
        return torch.cat(computed) if computed else torch.empty_like(rows)


class SharedExpert:
    """The expert that every token takes, as much of it as a gate of its own says (qwen2_moe)."""

    def __init__(self, mlp: Mlp, gate: Linear) -> None:
        """Take over the expert and its gate, one output."""
        self._mlp, self._gate = mlp, gate

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Its matrix products."""
        return *self._mlp.linears, self._gate

    def __call__(self, hidden: Tensor) -> Tensor:
        """Outputs [tokens, hidden] for hidden [tokens, hidden]."""
        return self._gate(hidden).sigmoid_() * self._mlp(hidden)


class Mixture:
    """What a sparse layer has in place of its MLP: gate, experts, and the way there and back."""

    def __init__(
        self, gate: Gate, experts: Experts | None, shared: SharedExpert | None = None
    ) -> None:
        """Put the parts together; without experts, which then are elsewhere, it is not called."""
        self.gate, self.experts, self._shared = gate, experts, shared

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Matrix products that every token goes through."""
        return () if self._shared is None else self._shared.linears

    @property
    def expert_linears(self) -> tuple[Linear, ...]:
        """Those of one expert, which sees any number of rows; none where they are elsewhere."""
        return () if self.experts is None else self.experts.linears

    def dispatch(self, hidden: Tensor) -> tuple[Routed, Tensor]:
        """Where tokens [tokens, hidden] go, and their rows [tokens * top_k, hidden] by expert."""
        routed = self.gate(hidden)
        return routed, scatter_rows(hidden, routed)

    def combine(self, hidden: Tensor, routed: Routed, rows: Tensor) -> Tensor:
        """Outputs [tokens, hidden] from what the experts made of the rows of `dispatch`.

        Args:
            hidden: what was dispatched; a shared expert computes from it.
            routed: where it went.
            rows: [tokens * top_k, hidden] of all experts, in the order in which they were sent.
        """
        output = expert_combine(rows, routed.slots, routed.weights)
        return output if self._shared is None else output + self._shared(hidden)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Outputs [tokens, hidden] for hidden [tokens, hidden], all of it here."""
        assert self.experts is not None, "the experts of this layer are elsewhere"
        routed, rows = self.dispatch(hidden)
        return self.combine(hidden, routed, self.experts(rows, routed.counts))


def _chosen(weight: Tensor, expert_ids: Sequence[int]) -> Tensor:
    if list(expert_ids) == list(range(len(weight))):
        return weight.contiguous()
    return weight[list(expert_ids)]


def _linear(weight: Tensor) -> Linear:
    return Linear(weight, pack=weight.numel() >= MIN_PACKED)
