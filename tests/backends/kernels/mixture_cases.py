"""Mixtures of experts with traps in them, and plain answers to compare with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from backends.kernels.expert_gate import Routed


def in_wider_rows(rows: Tensor) -> Tensor:
    """The same rows as a view of a buffer with NaN between them."""
    wide = torch.full((rows.shape[0], rows.shape[1] + 3), torch.nan).to(rows.device, rows.dtype)
    wide[:, : rows.shape[1]] = rows
    return wide[:, : rows.shape[1]]


def gate_case(
    tokens: int,
    experts: int,
    hidden: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    skewed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Hidden rows and gate weights in eighths: every order of summation gives the same logits.

    So choices can be compared exactly, and with few experts or dimensions many logits are equal.
    Skewed, the last expert is everyone's first choice and the first one everyone's last.
    """
    torch.manual_seed(tokens + 10 * experts + 100 * hidden)
    rows = torch.randint(-4, 5, (tokens, hidden)) / 8
    weights = torch.randint(-4, 5, (experts, hidden)) / 8
    if skewed:
        rows = rows.abs() + 0.125
        weights[-1], weights[0] = 0.625, -0.625
    return in_wider_rows(rows.to(device, dtype)), in_wider_rows(weights.to(device, dtype))


def plain_routing(
    hidden: Tensor, gate_weight: Tensor, top_k: int, renormalise: bool = True
) -> Routed:
    """The rule of `Routed` word by word, with lists of Python's floats."""
    logits = (hidden.double() @ gate_weight.double().T).tolist()
    expert_ids, weights = [], []
    for row in logits:
        powers = [math.exp(logit - max(row)) for logit in row]
        order = sorted(range(len(row)), key=lambda expert: (-powers[expert], expert))[:top_k]
        whole = sum(powers[expert] for expert in order) if renormalise else sum(powers)
        expert_ids.append(order)
        weights.append([powers[expert] / whole for expert in order])
    choices = sorted((expert, token) for token, row in enumerate(expert_ids) for expert in row)
    slots = [
        [choices.index((expert, token)) for expert in row] for token, row in enumerate(expert_ids)
    ]
    counts = [sum(expert == other for other, _ in choices) for expert in range(len(gate_weight))]
    shape = (len(logits), top_k)
    return Routed(
        expert_ids=torch.tensor(expert_ids, dtype=torch.int32).view(shape),
        weights=torch.tensor(weights, dtype=torch.float32).view(shape),
        counts=torch.tensor(counts, dtype=torch.int32),
        slots=torch.tensor(slots, dtype=torch.int32).view(shape),
    )


def expert_weights(
    experts: int,
    hidden: int,
    inner: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Gate-and-up and down weights, each expert dense, with an expert of NaN between any two."""
    torch.manual_seed(experts + 10 * hidden + 100 * inner)
    gate_up = torch.full((2 * experts, 2 * inner, hidden), torch.nan)
    down = torch.full((2 * experts, hidden, inner), torch.nan)
    gate_up[::2] = torch.randn(experts, 2 * inner, hidden) * hidden**-0.5
    down[::2] = torch.randn(experts, hidden, inner) * inner**-0.5
    return gate_up.to(device, dtype)[::2], down.to(device, dtype)[::2]


def plain_expert(row: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One row [hidden] through one SwiGLU network by the formula in float64."""
    inner = down.shape[1]
    gate, up = gate_up[:inner].double() @ row.double(), gate_up[inner:].double() @ row.double()
    return down.double() @ (gate / (1 + (-gate).exp()) * up)
