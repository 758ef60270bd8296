"""Softmax over some of the keys, with the log-sum-exp by which parts are merged, in plain torch.

Flash-Decoding (Dao et al., 2023) and ring attention (Liu et al., 2023) merge by the same rule: an
average over several parts is that of their averages, weighted by exp(lse).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def weigh_values(scores: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Values averaged by the softmax of their scores; a row of -inf alone gives 0 and lse -inf.

    Args:
        scores: float32 [batch, rows, keys], overwritten; at least one key.
        value: float32 [batch, keys, head_dim].

    Returns:
        Average [batch, rows, head_dim] and log-sum-exp [batch, rows].
    """
    peak = scores.amax(-1, keepdim=True)
    peak.masked_fill_(peak == -torch.inf, 0.0)
    weights = scores.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    lse = peak.add_(total.log()).squeeze(-1)
    return torch.bmm(weights, value).div_(total.masked_fill_(total == 0.0, 1.0)), lse


def request_bounds(name: str, starts: Tensor, rows: int) -> list[tuple[int, int]]:
    """First and last row of each request, refused when they do not lie one after the other.

    Only references check this: a kernel's launcher would have to wait for the GPU to read it.
    """
    bounds = list(pairwise(starts.tolist()))
    if int(starts[0]) != 0 or int(starts[-1]) != rows or any(end < start for start, end in bounds):
        raise ValueError(
            f"{name}={starts.tolist()} must rise from 0 to the {rows} rows that it divides; "
            "make it from the cumulative sum of the requests' lengths"
        )
    return bounds
