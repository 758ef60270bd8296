"""What a replica asks of whatever keeps the KV of prompts for later requests."""

from typing import Protocol

from sim.requests import RequestView
from sim.state.prefix_cache import CachedPrefix


class Prefixes(Protocol):
    """Cached blocks of one replica; `PrefixCache` by hash, `KnowledgePrefixes` by document."""

    @property
    def unheld(self) -> int:
        """Cached blocks on the GPU without a holder."""
        ...

    def cached(self, request: RequestView) -> CachedPrefix:
        """The longest cached prefix of a request that does not run."""
        ...

    def hold(self, request: RequestView) -> CachedPrefix:
        """Take a reference to all blocks that `cached` finds; the request runs from now on."""
        ...

    def store(self, request_id: int, tokens: int) -> tuple[int, int]:
        """Cache the blocks that are full now that a request has computed so many tokens.

        Returns:
            Own copies that are given up, and of the blocks held instead those that were free.
        """
        ...

    def release(self, request_id: int) -> int:
        """Give up what a request holds; returns the blocks that nobody holds any more."""
        ...

    def forget(self, request_id: int) -> None:
        """A request has left for good. What it cached stays."""
        ...

    def held_blocks(self, request_id: int) -> int:
        """Cached blocks that a request holds."""
        ...

    def shared_blocks(self, request_ids: tuple[int, ...]) -> int:
        """Cached blocks held by these requests that would not all become free with them."""
        ...

    def shrink(self, room: int) -> int:
        """Drop blocks without a holder until at most `room` are left; returns how many."""
        ...
