"""Attention over parts of a context, and how parts become the whole: plain torch.

Every part gives its output, normalised within the part, and the logarithm of the sum of its
exponentiated scores (lse); parts merge exactly (flash-decoding; ring attention, Liu et al., 2023).
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

State = tuple[Tensor, Tensor]
"""Of a prefill: output float32 [tokens, heads, head_dim] so far, and lse float32 [tokens, heads]"""
MOST_SCORES = 1 << 20
"""Scores of one request and all heads at once: they stay near the core. Queries go in pieces."""


def part_decode_attention(
    query: Tensor, key: Tensor, value: Tensor, slots: Tensor, starts: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of one query a request over the tokens of its part.

    Args:
        query: [requests, heads, head_dim].
        key: [num_slots, kv_heads, head_dim].
        value: as `key`.
        slots: int [tokens], those of the first request first.
        starts: int32 [requests + 1], where the slots of each begin, then their end.
        scale: of the scores.

    Returns:
        output float32 [requests, heads, head_dim] and lse float32 [requests, heads]; of an empty
        part 0 and minus infinity.
    """
    count, heads, dim = query.shape
    kv_heads = key.shape[1]
    output = torch.zeros((count, heads, dim), device=query.device)
    lse = torch.full((count, heads), -math.inf, device=query.device)
    grouped = query.float().view(count, kv_heads, -1, dim)
    keys, values = (part.index_select(0, slots).float() for part in (key, value))
    for row, (begin, end) in enumerate(pairwise(starts.tolist())):
        if begin == end:
            continue
        scores = grouped[row] @ keys[begin:end].permute(1, 2, 0) * scale
        sums = scores.logsumexp(-1)
        weights = (scores - sums[..., None]).exp()
        output[row] = (weights @ values[begin:end].transpose(0, 1)).view(heads, dim)
        lse[row] = sums.view(heads)
    return output, lse


def merge_parts(outputs: Tensor, lses: Tensor, dtype: torch.dtype) -> Tensor:
    """The whole from its parts.

    Args:
        outputs: float32 [parts, requests, heads, head_dim].
        lses: float32 [parts, requests, heads]; not all parts of a request are empty.
        dtype: of the result.

    Returns:
        [requests, heads, head_dim]
    """
    weights = (lses - lses.logsumexp(0)).exp()
    return (outputs * weights[..., None]).sum(0).to(dtype)


def new_state(tokens: int, heads: int, dim: int, device: torch.device | str) -> State:
    """The state of a prefill that has attended to nothing yet."""
    lse = torch.full((tokens, heads), -math.inf, device=device)
    return torch.zeros((tokens, heads, dim), device=device), lse


def striped_prefill_attention(  # noqa: PLR0913, PLR0917  the launcher's own arguments
    query: Tensor, key: Tensor, value: Tensor, query_positions: Tensor, key_positions: Tensor,
    query_starts: Tensor, key_starts: Tensor, scale: float, state: State,
) -> None:  # fmt: skip
    """Causal attention of tokens of several requests to a block of keys, merged into `state`.

    Args:
        query: [tokens, heads, head_dim].
        key: [kv_tokens, kv_heads, head_dim].
        value: as `key`.
        query_positions: int32 [tokens], each in its request, in order.
        key_positions: int32 [kv_tokens], in order too.
        query_starts: int32 [requests + 1], where the queries of each request begin, then their end.
        key_starts: int32 [requests + 1], the same of the keys.
        scale: of the scores.
        state: changed.
    """
    heads = query.shape[1]
    spans = zip(pairwise(query_starts.tolist()), pairwise(key_starts.tolist()), strict=True)
    for (begin, end), (first, last) in spans:
        if first == last:
            continue
        step = max(MOST_SCORES // (heads * (last - first)), 1)
        for at in range(begin, end, step):
            rows = slice(at, min(at + step, end))
            # Later keys are hidden from all of these queries.
            seen = key_positions[None, first:last] <= query_positions[rows, None]
            keys = slice(first, first + int(seen[-1].sum()))
            if keys.start < keys.stop:
                seen = seen[:, : keys.stop - first]
                part = _attend(query[rows], key[keys], value[keys], seen, scale)
                _merge(state, rows, part)


def _attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> State:
    """Of queries to keys where `seen` [tokens, keys]; a query that sees none has lse -inf."""
    tokens, heads, dim = query.shape
    kv_heads = key.shape[1]
    grouped = query.float().view(tokens, kv_heads, -1, dim).permute(1, 2, 0, 3)
    scores = grouped @ key.float().permute(1, 2, 0)[:, None] * scale
    scores.masked_fill_(~seen, -math.inf)
    sums = scores.logsumexp(-1)
    known = sums.masked_fill(sums == -math.inf, 0.0)
    output = (scores - known[..., None]).exp() @ value.float().transpose(0, 1)[:, None]
    order = output.permute(2, 0, 1, 3).reshape(tokens, heads, dim)
    return order, sums.permute(2, 0, 1).reshape(tokens, heads)


def _merge(state: State, rows: slice, part: State) -> None:
    output, lse = state[0][rows], state[1][rows]
    whole = torch.logaddexp(lse, part[1])
    known = whole.masked_fill(whole == -math.inf, 0.0)
    old, new = (lse - known).exp()[..., None], (part[1] - known).exp()[..., None]
    output.mul_(old).add_(part[0] * new)
    lse.copy_(whole)
