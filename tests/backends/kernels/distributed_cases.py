"""KV spread over instances, with traps in the pools, and the tokens of a ring of stripes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from kernel_cases import offsets
from torch import Tensor

from backends.kernels.striped_prefill_attention import RingState, Stripe


@dataclass(frozen=True, kw_only=True)
class PartCase:
    """One instance's part of the KV of several requests."""

    query: Tensor
    key: Tensor
    value: Tensor
    slots: Tensor
    starts: Tensor
    scale: float

    def arguments(self) -> tuple:
        return self.query, self.key, self.value, self.slots, self.starts, self.scale


def random_rows(rows: int, num_heads: int, head_dim: int, dtype=torch.float32, device="cpu"):
    """Rows [rows, num_heads, head_dim] of a wider buffer, as a view of a fused projection is."""
    wide = torch.randn(rows, num_heads + 2, head_dim).to(device, dtype)
    return wide[:, :num_heads]


def pool_of(rows: list[Tensor], spare: int = 3) -> tuple[Tensor, Tensor]:
    """A pool with those rows in any order and NaN between them, and their slots."""
    stored = torch.cat(rows)
    slots = torch.randperm(len(stored) + spare)[: len(stored)]
    pool = torch.full((len(stored) + spare, *stored.shape[1:]), torch.nan)
    pool = pool.to(stored.device, stored.dtype)
    pool[slots.to(stored.device)] = stored
    return pool, slots.to(stored.device)


def part_case(
    lengths: list[int],
    *,
    num_kv_heads: int = 2,
    group: int = 3,
    head_dim: int = 24,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> PartCase:
    """Random KV of those lengths; slots are int32 for an even total, int64 for an odd one."""
    torch.manual_seed(sum(lengths) + head_dim)
    shape = (sum(lengths), num_kv_heads, head_dim)
    key, slots = pool_of([torch.randn(shape).to(device, dtype)])
    value = torch.full_like(key, torch.nan)
    value[slots] = torch.randn(shape).to(device, dtype)
    return PartCase(
        query=random_rows(len(lengths), num_kv_heads * group, head_dim, dtype, device),
        key=key,
        value=value,
        slots=slots if len(slots) % 2 else slots.int(),
        starts=offsets(lengths, device),
        scale=head_dim**-0.5,
    )


def stripe_of(lengths: list[int], instance: int, instances: int, device="cpu") -> Stripe:
    """Tokens instance, instance + instances, ... of prompts of those lengths."""
    positions = [torch.arange(length)[instance::instances] for length in lengths]
    return Stripe(
        torch.cat(positions).to(device, torch.int32), offsets([*map(len, positions)], device)
    )


def rows_of(lengths: list[int], stripe: Stripe) -> Tensor:
    """Where the tokens of a stripe lie among all tokens of all prompts, one after the other."""
    counts = stripe.starts.diff().long()
    firsts = torch.tensor([0, *lengths[:-1]], device=counts.device).cumsum(0)
    return firsts.repeat_interleave(counts) + stripe.positions


def ring_attention(attend, tokens, lengths: list[int], instances: int) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of all tokens (query, key, value) after the rounds of each instance.

    `attend(query, kv, queries, keys, state)` is one round.
    """
    query, key, value = tokens
    output = torch.full(query.shape, torch.nan, device=query.device)
    lse = torch.full(query.shape[:2], torch.nan, device=query.device)
    stripes = [stripe_of(lengths, i, instances, query.device) for i in range(instances)]
    for instance, queries in enumerate(stripes):
        mine = rows_of(lengths, queries)
        state = RingState(torch.zeros_like(output[mine]), torch.full_like(lse[mine], -torch.inf))
        for step in range(instances):
            keys = stripes[(instance - step) % instances]
            theirs = rows_of(lengths, keys)
            attend(query[mine], (key[theirs], value[theirs]), queries, keys, state)
        output[mine], lse[mine] = state
    return output, lse
