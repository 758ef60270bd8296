"""What one forward pass computes: decodes first, then prefill chunks, as flat rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from backends.kv_cache import PagedKVCache


class Chunk(NamedTuple):
    """Tokens of one request to compute in one iteration; one token is a decode."""

    request_id: int
    token_ids: Sequence[int]
    """The tokens to compute, at least one."""
    start: int
    """Position of the first of them: how many of the request are cached before."""
    sample: bool = True
    """Whether the logits after the last of them are wanted; not before a prompt is complete."""


class Begun(NamedTuple):
    """A batch that has been decided and not been computed yet."""

    instant_s: float
    """Of its decision."""
    chunks: list[Chunk]

    @property
    def num_sampled(self) -> int:
        """Tokens that come of it."""
        return sum(chunk.sample for chunk in self.chunks)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """Rows of one forward pass, on the CPU. The first `num_decodes` rows are a sequence each."""

    token_ids: Tensor
    """int64 [tokens]"""
    positions: Tensor
    """int64 [tokens]"""
    slot_mapping: Tensor
    """int64 [tokens], where keys and values go; -1: nowhere"""
    num_decodes: int
    block_tables: Tensor
    """int32 [sequences, most blocks], decodes first"""
    context_lengths: Tensor
    """int32 [sequences], tokens that the last row of each sees, itself included"""
    query_starts: Tensor
    """int32 [prefills + 1], first row of each prefill chunk after the decodes, then their end"""
    logit_rows: Tensor
    """int64 [sampled], the rows whose logits are wanted, in the order of the chunks given"""
    max_context: int
    """Largest of `context_lengths`"""
    block_size: int
    """Tokens a block of the cache"""

    @classmethod
    def build(cls, cache: PagedKVCache, chunks: Sequence[Chunk]) -> ForwardBatch:
        """The pass that computes `chunks`, whose requests hold blocks enough in `cache`.

        Raises:
            ValueError: no chunk, an empty one, or one without room in the cache.
        """
        empty = [chunk.request_id for chunk in chunks if not chunk.token_ids]
        if empty or not chunks:
            raise ValueError(
                f"requests {empty} of {len(chunks)} chunks bring no token; leave them out"
            )
        order = sorted(range(len(chunks)), key=lambda index: len(chunks[index].token_ids) > 1)
        ordered = [chunks[index] for index in order]
        num_decodes = sum(len(chunk.token_ids) == 1 for chunk in chunks)
        ends = list(accumulate(len(chunk.token_ids) for chunk in ordered))
        end_of = dict(zip(order, ends, strict=True))
        spans = [range(chunk.start, chunk.start + len(chunk.token_ids)) for chunk in ordered]
        slots = (
            cache.slots(chunk.request_id, chunk.start, len(chunk.token_ids)) for chunk in ordered
        )
        sampled = [end_of[index] - 1 for index, chunk in enumerate(chunks) if chunk.sample]
        starts = [0, *(end - num_decodes for end in ends[num_decodes:])]
        return cls(
            token_ids=torch.tensor([token for chunk in ordered for token in chunk.token_ids]),
            positions=torch.tensor([position for span in spans for position in span]),
            slot_mapping=torch.tensor([slot for part in slots for slot in part]),
            num_decodes=num_decodes,
            block_tables=cache.block_tables([chunk.request_id for chunk in ordered]),
            context_lengths=torch.tensor([span.stop for span in spans], dtype=torch.int32),
            query_starts=torch.tensor(starts, dtype=torch.int32),
            logit_rows=torch.tensor(sampled, dtype=torch.int64),
            max_context=max(span.stop for span in spans),
            block_size=cache.block_size,
        )
