"""How a real replica keeps KV of prompts for later requests: by hashes of blocks, or otherwise."""

from __future__ import annotations

from typing import Protocol

from backends.kv_cache import PagedKVCache
from backends.observed import Sequence
from backends.prefix_cache import block_hashes, own_hashes
from sim.state.prefix_cache import NOTHING_CACHED, CachedPrefix


class PromptStore(Protocol):
    """Decides which blocks of a KV cache outlive their request."""

    def submitted(self, sequence: Sequence) -> None:
        """A request has come in."""
        ...

    def cached(self, sequence: Sequence) -> CachedPrefix:
        """What of a waiting request is cached; one token at least is left to compute."""
        ...

    def hold(self, sequence: Sequence) -> int:
        """A request gets a seat and holds what is cached of it; returns how many tokens that is."""
        ...

    def load(self) -> None:
        """Bring what was held since the last call to where it is computed with."""
        ...

    def make_room(self, blocks: int, now_s: float) -> None:
        """So many blocks are taken next: give up what no request holds, as far as it is needed."""
        ...

    def store(self, sequence: Sequence) -> None:
        """Keep the blocks of a prompt that are full now."""
        ...

    def leave(self, sequence: Sequence) -> None:
        """A request is about to give its blocks back."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """A request has left for good."""
        ...


class HashedPrompts:
    """Automatic prefix caching: blocks are found by the hash of all tokens up to their end."""

    def __init__(self, cache: PagedKVCache) -> None:
        self._cache = cache

    def submitted(self, sequence: Sequence) -> None:
        """Hash the blocks of its prompt."""
        prompt = sequence.tokens[: sequence.request.prompt_tokens]
        sequence.hashes = block_hashes(prompt, self._cache.block_size)

    def cached(self, sequence: Sequence) -> CachedPrefix:
        """The longest prefix that is found."""
        blocks = self._find(sequence)
        if not blocks:
            return NOTHING_CACHED
        free = int((self._cache.holders[blocks] == 0).sum())
        return CachedPrefix(len(blocks) * self._cache.block_size, free)

    def hold(self, sequence: Sequence) -> int:
        """Begin the request with the blocks that are found."""
        blocks = self._find(sequence)
        if blocks:
            self._cache.hold(sequence.request.request_id, blocks)
        return len(blocks) * self._cache.block_size

    def load(self) -> None:
        """Cached blocks are where they are computed with."""

    def make_room(self, blocks: int, now_s: float) -> None:
        """The cache gives cached blocks up when it runs out of others."""
        del blocks, now_s

    def store(self, sequence: Sequence) -> None:
        """Make full blocks findable."""
        self._cache.store(sequence.request.request_id, sequence.hashes, sequence.computed)

    def leave(self, sequence: Sequence) -> None:
        """Blocks that the answer so far has filled stay, for the request itself to find again."""
        if not sequence.computed:
            return
        request_id, whole = sequence.request.request_id, len(sequence.hashes)
        full = sequence.computed // self._cache.block_size
        sequence.hashes = [*sequence.hashes, *own_hashes(request_id, whole, full)]
        self.store(sequence)

    def forget(self, sequence: Sequence) -> None:
        """Its blocks stay findable."""

    def _find(self, sequence: Sequence) -> list[int]:
        most = (len(sequence.tokens) - 1) // self._cache.block_size
        return self._cache.prefixes.find(sequence.hashes[:most])
