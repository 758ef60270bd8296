"""What a replica asks of whatever computes for it: one rank's model, or the driver of several."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch

from backends.forward_batch import Chunk
from backends.kv_cache import PagedKVCache
from backends.sampling import Sampler
from sim.models.architecture import Architecture


class Executor(Protocol):
    """Computes tokens."""

    @property
    def config(self) -> Architecture:
        """The model; of several ranks the first one's share of it, with the whole vocabulary."""
        ...

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        ...

    @property
    def max_context(self) -> int:
        """Longest context in tokens."""
        ...

    def new_cache(self, num_blocks: int, block_size: int) -> PagedKVCache:
        """An empty cache; with several ranks each makes one, and this is the first one's."""
        ...

    def warm_up(self, tokens: Iterable[int], sampled: Iterable[int]) -> None:
        """Prepare for batches of so many tokens and sampled positions."""
        ...

    def next_tokens(
        self, chunks: Sequence[Chunk], cache: PagedKVCache, sampler: Sampler
    ) -> list[int]:
        """One forward pass; the next token of every chunk that wants one, in order."""
        ...
