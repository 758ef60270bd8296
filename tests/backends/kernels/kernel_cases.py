"""Paged problems with traps in them, plain answers to compare with, and the tolerance per dtype."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from backends.kernels.paged import KvCache

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}
"""Absolute and relative. The interpreter truncates to bfloat16 where hardware rounds."""

DTYPES = tuple(TOLERANCE)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
POISON_BLOCK = 2**30
few_examples = settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
"""For kernels, which the interpreter runs slowly."""


def in_each_dtype(values: Sequence[int]) -> list[tuple[torch.dtype, int]]:
    """Every dtype with every value on CUDA; interpreted, where one takes seconds, each of both."""
    if INTERPRETED:
        return list(zip(DTYPES, values, strict=True))
    return [(dtype, value) for dtype in DTYPES for value in values]


def assert_near(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=tolerance, atol=tolerance)


@dataclass(frozen=True, kw_only=True)
class PagedCase:
    keys: list[Tensor]
    """per sequence [context, num_kv_heads, head_dim]"""
    values: list[Tensor]
    cache: KvCache
    block_tables: Tensor
    context_lengths: Tensor
    scale: float


def paged_case(
    lengths: list[int],
    *,
    num_kv_heads: int = 3,
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> PagedCase:
    """A cache with NaN in each slot not written, and tables with a wild block past each length."""
    torch.manual_seed(sum(lengths) + head_dim)
    needed = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(needed) + 2)
    shape = (len(order), block_size, num_kv_heads, head_dim)
    cache = KvCache(torch.full(shape, torch.nan), torch.full(shape, torch.nan))
    tables = torch.full((len(lengths), max(needed) + 1), POISON_BLOCK, dtype=torch.int32)
    keys, values, taken = [], [], 0
    for sequence, length in enumerate(lengths):
        blocks = order[taken : taken + needed[sequence]]
        taken += needed[sequence]
        tables[sequence, : len(blocks)] = blocks
        key, value = torch.randn(2, length, num_kv_heads, head_dim)
        tokens = torch.arange(length)
        for part, rows in zip(cache, (key, value), strict=True):
            part[blocks[tokens // block_size], tokens % block_size] = rows
        keys.append(key.to(device, dtype))
        values.append(value.to(device, dtype))
    return PagedCase(
        keys=keys,
        values=values,
        cache=KvCache(*(part.to(device, dtype) for part in cache)),
        block_tables=tables.to(device),
        context_lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
        scale=head_dim**-0.5,
    )


def random_query(case: PagedCase, tokens: int, num_heads: int) -> Tensor:
    """Rows of a wider buffer, as a view of a fused projection is."""
    head_dim, key = case.cache.key.shape[3], case.cache.key
    wide = torch.randn(tokens, num_heads + 2, head_dim).to(key.device, key.dtype)
    return wide[:, :num_heads]


def plain_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Softmax by the formula in float64: rows [chunk, heads, dim] at the end of one context."""
    group = query.shape[1] // key.shape[1]
    chunk, context = query.shape[0], key.shape[0]
    key, value = (part.double().repeat_interleave(group, dim=1) for part in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.double(), key) * scale
    future = torch.ones(chunk, context, dtype=torch.bool, device=query.device).triu(
        context - chunk + 1
    )
    weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, value).to(query.dtype)


def offsets(chunks: list[int], device: str = "cpu") -> Tensor:
    """Start of each chunk and the end of the last, int32 [chunks + 1]."""
    ends = torch.tensor([0, *chunks]).cumsum(0)
    return ends.to(device, torch.int32)
