"""Attention over the paged cache for one iteration: kernels, or gathered tensors on the CPU.

On the CPU the index of what to gather is made once an iteration and used by every layer. The cache
lies head by head there (see `backends.kv_layout`), so that whole pieces are copied and come out as
[sequences * num_kv_heads, context, head_dim], which two batched matrix products take as they are.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from backends.forward_batch import ForwardBatch
from backends.kernels.paged import KvCache
from backends.kernels.paged_decode_attention import paged_decode_attention
from backends.kernels.paged_prefill_attention import paged_prefill_attention
from backends.kv_layout import gather_pieces

PADDING_TOKENS = 128
"""Padding that a group of decodes takes on before another group costs less than more padding."""


class KernelAttention:
    """The launchers of `backends.kernels`."""

    def __init__(self, batch: ForwardBatch, device: torch.device, scale: float) -> None:
        self._num_decodes, self._scale = batch.num_decodes, scale
        tables, lengths = batch.block_tables.to(device), batch.context_lengths.to(device)
        self._decodes = tables[: batch.num_decodes], lengths[: batch.num_decodes]
        self._prefills = tables[batch.num_decodes :], lengths[batch.num_decodes :]
        self._starts = batch.query_starts.to(device)

    def __call__(self, query: Tensor, cache: KvCache) -> Tensor:
        """Attended values [tokens, num_heads, head_dim] for queries of that shape."""
        decodes, parts = self._num_decodes, []
        if decodes:
            parts.append(
                paged_decode_attention(query[:decodes], cache, *self._decodes, self._scale)
            )
        if decodes < len(query):
            arguments = (*self._prefills, self._starts, self._scale)
            parts.append(paged_prefill_attention(query[decodes:], cache, *arguments))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class _DecodeGroup(NamedTuple):
    """Decodes of like context length."""

    rows: Tensor | None
    """int64 [sequences]; None when the group is all rows of the iteration"""
    gather: Tensor
    """int64 [sequences * num_kv_heads * blocks], block * num_kv_heads + head"""
    bias: Tensor
    """float32 [sequences * num_kv_heads, 1, blocks * block_size], -inf where the padding is"""


class _Prefill(NamedTuple):
    """One chunk."""

    rows: slice
    gather: Tensor
    """int64 [num_kv_heads * blocks], block * num_kv_heads + head"""
    context: int
    bias: Tensor | None
    """float32 [chunk, context], -inf where a later key is; None when the chunk has no prefix"""


class GatheredAttention:
    """Plain torch on the CPU."""

    def __init__(self, batch: ForwardBatch, num_kv_heads: int, scale: float) -> None:
        self._num_kv_heads, self._scale, self._batch = num_kv_heads, scale, batch
        lengths = batch.context_lengths.tolist()
        groups = group_by_length(lengths[: batch.num_decodes])
        self._groups = [self._decode_group(rows, lengths) for rows in groups]
        starts = batch.query_starts.tolist()
        self._prefills = [
            self._prefill(sequence, lengths[sequence], start, end)
            for sequence, (start, end) in enumerate(pairwise(starts), start=batch.num_decodes)
        ]

    def __call__(self, query: Tensor, cache: KvCache) -> Tensor:
        """Attended values [tokens, num_heads, head_dim] for queries of that shape."""
        if len(self._groups) == 1 and self._groups[0].rows is None:
            return self._decode(query, self._groups[0], cache)
        output = torch.empty_like(query)
        for group in self._groups:
            assert group.rows is not None
            output[group.rows] = self._decode(query[group.rows], group, cache)
        for prefill in self._prefills:
            output[prefill.rows] = self._attend_chunk(query[prefill.rows], prefill, cache)
        return output

    def _decode(self, query: Tensor, group: _DecodeGroup, cache: KvCache) -> Tensor:
        pairs, head_dim = group.bias.shape[0], query.shape[2]
        heads = query.reshape(pairs, -1, head_dim)
        key = gather_pieces(cache.key, group.gather).view(pairs, -1, head_dim)
        scores = torch.baddbmm(group.bias, heads, key.transpose(1, 2), alpha=self._scale)
        # Gathered only now: there is room for one of the two near the core.
        value = gather_pieces(cache.value, group.gather).view(pairs, -1, head_dim)
        return torch.bmm(scores.softmax(-1), value).view(query.shape)

    def _attend_chunk(self, query: Tensor, prefill: _Prefill, cache: KvCache) -> Tensor:
        head_dim = query.shape[2]
        shape = (1, self._num_kv_heads, -1, head_dim)
        key, value = (
            gather_pieces(part, prefill.gather).view(shape)[:, :, : prefill.context]
            for part in cache
        )
        attended = scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            key,
            value,
            attn_mask=prefill.bias,
            is_causal=prefill.bias is None,
            scale=self._scale,
            enable_gqa=True,
        )
        return attended[0].transpose(0, 1)

    def _gather_index(self, rows: list[int], context: int) -> Tensor:
        blocks = -(-context // self._batch.block_size)
        tables = self._batch.block_tables[rows, :blocks].long()
        heads = torch.arange(self._num_kv_heads)
        return (tables[:, None, :] * self._num_kv_heads + heads[None, :, None]).flatten()

    def _decode_group(self, rows: list[int], lengths: list[int]) -> _DecodeGroup:
        context, size = max(lengths[row] for row in rows), self._batch.block_size
        padding = (
            torch.arange(-(-context // size) * size)[None]
            >= self._batch.context_lengths[rows][:, None]
        )
        bias = torch.zeros(padding.shape).masked_fill_(padding, float("-inf"))
        alone = len(rows) == len(self._batch.positions)
        return _DecodeGroup(
            rows=None if alone and rows == sorted(rows) else torch.tensor(rows),
            gather=self._gather_index(rows, context),
            bias=bias.repeat_interleave(self._num_kv_heads, 0)[:, None, :],
        )

    def _prefill(self, sequence: int, context: int, start: int, end: int) -> _Prefill:
        chunk, bias = end - start, None
        if (
            chunk < context
        ):  # torch's own causal mask starts at the first key, ours ends at the last
            bias = torch.full((chunk, context), float("-inf")).triu_(context - chunk + 1)
        first = self._batch.num_decodes + start
        return _Prefill(
            rows=slice(first, first + chunk),
            gather=self._gather_index([sequence], context),
            context=context,
            bias=bias,
        )


def group_by_length(lengths: list[int]) -> list[list[int]]:
    """Indices of `lengths` in groups whose padding to their longest is at most PADDING_TOKENS."""
    groups: list[list[int]] = []
    longest = padding = 0
    for index in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        padding += longest - lengths[index]
        if not groups or padding > PADDING_TOKENS:
            groups.append([])
            longest, padding = lengths[index], 0
        groups[-1].append(index)
    return [sorted(group) for group in groups]
