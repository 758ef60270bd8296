"""The gate of a mixture of experts: which experts each token goes to, and the row it gets there.

hidden [tokens, hidden] and gate_weight [experts, hidden] -> `Routed`. Product, softmax, top-k,
weights, counts and scatter index are one fused operator, as in MegaScale-Infer (Zhu et al., 2025).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backends.kernels.checks import (
    check_float,
    check_index,
    check_like,
    check_packed,
    check_shape,
)

MOST_EXPERTS = 1024
"""The probabilities of a tile of tokens stay in registers, whole."""


class Routed(NamedTuple):
    """The choices of each token, and where they stand once all choices are sorted by expert."""

    expert_ids: Tensor
    """int32 [tokens, top_k], by decreasing probability, the lower id first among equals"""
    weights: Tensor
    """float32 [tokens, top_k], the probability of each choice among all experts; divided by their
    sum where renormalised"""
    counts: Tensor
    """int32 [experts], rows of each expert"""
    slots: Tensor
    """int32 [tokens, top_k], row of each choice when all are sorted by expert; within an expert
    by token"""


def expert_gate_reference(
    hidden: Tensor, gate_weight: Tensor, top_k: int, renormalise: bool = True
) -> Routed:
    """What `expert_gate` computes, in plain torch."""
    probabilities = (hidden.float() @ gate_weight.float().T).softmax(-1)
    ordered, experts = probabilities.sort(dim=-1, descending=True, stable=True)
    weights, expert_ids = ordered[:, :top_k], experts[:, :top_k]
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    chosen = expert_ids.flatten()
    slots = torch.empty_like(chosen)
    slots[chosen.argsort(stable=True)] = torch.arange(len(chosen), device=chosen.device)
    return Routed(
        expert_ids=expert_ids.int().contiguous(),
        weights=weights.contiguous(),
        counts=chosen.bincount(minlength=gate_weight.shape[0]).int(),
        slots=slots.view(expert_ids.shape).int(),
    )


def scatter_rows_reference(hidden: Tensor, routed: Routed) -> Tensor:
    """What `scatter_rows` computes, in plain torch."""
    tokens, top_k = routed.slots.shape
    rows = torch.empty((tokens * top_k, hidden.shape[1]), dtype=hidden.dtype, device=hidden.device)
    rows[routed.slots.flatten().long()] = hidden.repeat_interleave(top_k, dim=0)
    return rows


def expert_gate(
    hidden: Tensor, gate_weight: Tensor, top_k: int, renormalise: bool = True
) -> Routed:
    """Choose `top_k` experts a token by softmax over all of them, and count and place the choices.

    Args:
        hidden: [tokens, hidden], rows dense, the row stride free; no tokens is allowed.
        gate_weight: [experts, hidden], hidden's dtype; experts need not be a power of two.
        top_k: choices a token, at most the experts.
        renormalise: whether the weights of a token sum to one.
    """
    _check_gate(hidden, gate_weight, top_k)
    return expert_gate_reference(hidden, gate_weight, top_k, renormalise)


def scatter_rows(hidden: Tensor, routed: Routed) -> Tensor:
    """A copy of each token's row for each of its choices, sorted by expert.

    Args:
        hidden: [tokens, hidden], rows dense, the row stride free.
        routed: of these tokens, as `expert_gate` returns it.

    Returns:
        [tokens * top_k, hidden].
    """
    check_float("hidden", hidden)
    check_shape("hidden", hidden, (None, None), "tokens, hidden")
    check_packed("hidden", hidden)
    check_shape("routed.slots", routed.slots, (hidden.shape[0], None), "tokens of hidden, top_k")
    check_index("routed.slots", routed.slots, torch.int32, hidden)
    return scatter_rows_reference(hidden, routed)


def _check_gate(hidden: Tensor, gate_weight: Tensor, top_k: int) -> None:
    check_float("hidden", hidden)
    check_shape("hidden", hidden, (None, None), "tokens, hidden; flatten leading dimensions first")
    check_packed("hidden", hidden)
    check_shape("gate_weight", gate_weight, (None, hidden.shape[1]), "experts, hidden")
    check_like("gate_weight", gate_weight, "hidden", hidden)
    check_packed("gate_weight", gate_weight)
    experts = gate_weight.shape[0]
    if not 1 <= experts <= MOST_EXPERTS:
        raise ValueError(
            f"gate_weight has {experts} experts and must have 1 to {MOST_EXPERTS}: a program keeps "
            "the probabilities of its tokens in registers; split the experts into groups"
        )
    if not 1 <= top_k <= experts:
        raise ValueError(
            f"top_k={top_k} must be between 1 and experts={experts}; check the configuration"
        )
