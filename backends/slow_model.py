"""A model that takes longer than it must: a straggler, emulated by sleeping after each pass."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import torch

from backends.arrivals import sleep_until
from backends.executor import Executor
from backends.forward_batch import Chunk
from backends.kv_cache import PagedKVCache
from backends.sampling import Sampler
from sim.models.architecture import Architecture
from sim.slowness import Apart, SlowTimes


class SlowModel:
    """An `Executor` whose passes end when the simulated panel would let them end.

    All of a pass counts as computing: on one rank nothing crosses a link.
    """

    def __init__(self, model: Executor, times: SlowTimes) -> None:
        self._model = model
        self._times = times
        self.start = float("inf")
        """The clock's reading at t = 0; before that nothing is slow."""

    @property
    def config(self) -> Architecture:
        """As of the model."""
        return self._model.config

    @property
    def device(self) -> torch.device:
        """As of the model."""
        return self._model.device

    @property
    def max_context(self) -> int:
        """As of the model."""
        return self._model.max_context

    def new_cache(self, num_blocks: int, block_size: int) -> PagedKVCache:
        """As of the model."""
        return self._model.new_cache(num_blocks, block_size)

    def warm_up(self, tokens: Iterable[int], sampled: Iterable[int]) -> None:
        """As of the model."""
        self._model.warm_up(tokens, sampled)

    def next_tokens(
        self, chunks: Sequence[Chunk], cache: PagedKVCache, sampler: Sampler
    ) -> list[int]:
        """One forward pass, and the time that it would take beyond that."""
        began = time.perf_counter()
        tokens = self._model.next_tokens(chunks, cache, sampler)
        taken_s = time.perf_counter() - began
        if began >= self.start:
            sleep_until(self.start + self._times.end_s(began - self.start, taken_s, Apart()))
        return tokens
