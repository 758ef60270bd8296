"""Blocks of a real KV cache that stay findable by the tokens that they and their prefix hold.

The twin of `sim/state/prefix_cache.py`, with an entry for every block: a block's hash covers its
own tokens and the hash of the block before it, so equal hashes mean equal prompts up to there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from backends.corruption import Corruption


def block_hashes(token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """Chain hashes of the whole blocks of a prompt."""
    tokens = np.asarray(token_ids, np.int64)
    hashes: list[bytes] = []
    before = b""
    for end in range(block_size, len(tokens) + 1, block_size):
        before = blake2b(before + tokens[end - block_size : end].tobytes(), digest_size=16).digest()
        hashes.append(before)
    return hashes


def own_hashes(request_id: int, first: int, stop: int) -> list[bytes]:
    """Names of the blocks `first` to `stop` of a request that hold tokens of its answer.

    Another request that is asked for the same tokens does not find them: on the simulated panel
    nobody knows what an answer says.
    """
    return [b"answer %d %d" % (request_id, at) for at in range(first, stop)]


class PrefixIndex:
    """Which block holds which prefix, and in which order blocks without a holder are given up.

    It remembers names and an order. Who holds a block, and what is written in it, is the cache's to
    say.
    """

    def __init__(self) -> None:
        self._block: dict[bytes, int] = {}
        self._hash: dict[int, bytes] = {}
        self._unheld: OrderedDict[int, None] = OrderedDict()
        self._num_evictions = 0
        self.corrupt: Corruption | None = None

    def find(self, hashes: Sequence[bytes]) -> list[int]:
        """Blocks of the longest prefix that is cached."""
        blocks: list[int] = []
        for one in hashes:
            block = self._block.get(one)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def name(self, block: int, one: bytes) -> None:
        """Make a block findable by a hash that no other block has."""
        self._block[one] = block
        self._hash[block] = one

    def taken(self, block: int) -> None:
        """A block has a holder, and is not given up."""
        self._unheld.pop(block, None)

    def released(self, block: int) -> None:
        """A block has lost its last holder: it is given up after all that were released before."""
        self._unheld[block] = None

    def evict(self) -> int | None:
        """The block that was released longest ago, which no hash finds any more; None: none is."""
        if not self._unheld:
            return None
        block, _ = self._unheld.popitem(last=False)
        one = self._hash.pop(block)
        fault = self.corrupt
        stale = fault is not None and fault.kind == "stale_block"
        if not (stale and fault is not None and self._num_evictions >= fault.index):
            self._block.pop(one, None)
        self._num_evictions += 1
        return block
