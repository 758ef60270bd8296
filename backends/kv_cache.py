"""The paged KV cache of one replica: its tensors, who owns each block, and the bytes moved.

PagedAttention: Kwon et al., 2023.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from backends.corruption import Corruption
from backends.kernels.paged import KvCache
from backends.kv_layout import empty_blocks
from backends.prefix_cache import PrefixIndex
from sim.models.architecture import Architecture

__all__ = ["CACHED", "FREE", "Corruption", "PagedKVCache"]

FREE = -1
"""Owner of a block that nobody holds; also the slot of a token that is not written."""
LOST_VALUE = 1e3
"""What keys and values are after a loss: far from any that a model computes, and finite, as masked
slots of a block are multiplied by zero."""
CACHED = -2
"""Owner of a block with a cached prefix, however many requests hold it."""


class PagedKVCache:
    """Keys and values of every layer in blocks, and the allocator of those blocks.

    What is free, owned, held or written is read off `owner`, `holders` and `written`; the tables
    kept beside them only remember the order of a request's blocks. They lie on the CPU, where
    decisions are made, whatever the device of the keys and values.
    """

    def __init__(
        self,
        config: Architecture,
        num_blocks: int,
        block_size: int = 16,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks={num_blocks}, block_size={block_size} must be at least 1")
        shape = (num_blocks, block_size, config.num_kv_heads, config.head_dim)
        place = (torch.device(device), dtype)
        self.layers = [
            KvCache(empty_blocks(shape, *place), empty_blocks(shape, *place))
            for _ in range(config.num_layers)
        ]
        """Per layer key and value [num_blocks, block_size, num_kv_heads, head_dim]"""
        self.num_blocks, self.block_size = num_blocks, block_size
        self.owner = torch.full((num_blocks,), FREE, dtype=torch.int64)
        """int64 [num_blocks], the request whose tokens each block holds, or FREE or CACHED"""
        self.holders = torch.zeros(num_blocks, dtype=torch.int64)
        """int64 [num_blocks], how many requests hold each block"""
        self.written = torch.zeros(num_blocks, block_size, dtype=torch.bool)
        """bool [num_blocks, block_size], the slots whose token a request has stored"""
        self.corrupt: Corruption | None = None
        self.on_free: Callable[[int], object] | None = None
        """Told of each request that gives its blocks back."""
        self.written_tokens = self.read_tokens = self.freed_tokens = 0
        self.prefixes = PrefixIndex()
        self.keeps_order = True
        """Whether blocks without a holder are given up in the order of `prefixes`."""
        self._tables: dict[int, list[int]] = {}
        self._stored: dict[int, int] = {}
        """Leading blocks of a request that are cached."""
        self._num_frees = 0

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody holds, counted from `holders`."""
        return int((self.holders == 0).sum())

    @property
    def cached_blocks(self) -> int:
        """Of the free blocks, those with a cached prefix, counted from `owner`."""
        return int(((self.owner == CACHED) & (self.holders == 0)).sum())

    @property
    def cached_tokens(self) -> int:
        """Tokens stored in any block, counted from `written`."""
        return int(self.written.sum())

    @property
    def token_bytes(self) -> int:
        """Payload of one token: its keys and values in all layers."""
        rows = [part[0, 0] for layer in self.layers for part in layer]
        return sum(row.numel() * row.element_size() for row in rows)

    @property
    def written_bytes(self) -> int:
        """Payload that was really stored since the start."""
        return self.written_tokens * self.token_bytes

    @property
    def read_bytes(self) -> int:
        """Payload that attention read since the start: each context once a chunk or token."""
        return self.read_tokens * self.token_bytes

    @property
    def freed_bytes(self) -> int:
        """Payload that was stored and has been given up since the start."""
        return self.freed_tokens * self.token_bytes

    def requests(self) -> list[int]:
        """The requests that hold blocks."""
        return list(self._tables)

    def blocks_needed(self, request_id: int, tokens: int) -> int:
        """Blocks that `allocate` would take for the same arguments."""
        return max(0, -(-tokens // self.block_size) - len(self._tables.get(request_id, ())))

    def allocate(self, request_id: int, tokens: int) -> None:
        """Make room for `tokens` tokens of a request in all; what it holds already counts.

        Raises:
            ValueError: too few blocks are free; nothing was taken.
        """
        if request_id < 0:
            raise ValueError(f"request_id={request_id} must not be negative; {FREE} marks a hole")
        wanted = self.blocks_needed(request_id, tokens)
        if not wanted:
            return
        if wanted > self.free_blocks:
            raise ValueError(
                f"request {request_id} needs {wanted} more blocks for {tokens} tokens, but "
                f"free_blocks={self.free_blocks} of {self.num_blocks}; free a request first"
            )
        free = (self.owner == FREE).nonzero()[:wanted, 0]
        while len(free) < wanted and (block := self.prefixes.evict()) is not None:
            self._empty([block])
            free = (self.owner == FREE).nonzero()[:wanted, 0]
        self.owner[free] = request_id
        self.holders[free] += 1
        self._tables.setdefault(request_id, []).extend(free.tolist())

    def hold(self, request_id: int, blocks: Sequence[int]) -> None:
        """Begin a request with blocks that are cached, in the order of its tokens."""
        self._tables[request_id] = list(blocks)
        self._stored[request_id] = len(blocks)
        for block in blocks:
            self._take(block)

    def store(self, request_id: int, hashes: Sequence[bytes], tokens: int) -> None:
        """Cache the prompt blocks that are full now that so many tokens are computed.

        Where another block is cached under the same hash, the request holds that one from now on
        and gives up its copy.

        Args:
            request_id: who computed them.
            hashes: of all whole blocks of its prompt.
            tokens: computed so far.
        """
        table = self._table(request_id)
        first, full = self._stored.get(request_id, 0), min(tokens // self.block_size, len(hashes))
        for at in range(first, full):
            known = self.prefixes.find(hashes[at : at + 1])
            if known:
                self._take(known[0])
                copy, table[at] = table[at], known[0]
                self.holders[copy] -= 1
                self._empty([copy])
            else:
                self.prefixes.name(table[at], hashes[at])
                self.owner[table[at]] = CACHED
        self._stored[request_id] = max(first, full)

    def take_cached(self, count: int) -> list[int]:
        """Empty blocks for a cached prefix that is copied into them; nobody holds them yet.

        Raises:
            ValueError: fewer blocks are empty.
        """
        free = (self.owner == FREE).nonzero()[:count, 0]
        if len(free) < count:
            raise ValueError(f"{count} blocks are to be loaded and {len(free)} are empty")
        self.owner[free] = CACHED
        self.written[free] = True
        return free.tolist()

    def lose(self) -> None:
        """All keys and values are gone: what reads one that was not computed again shows it."""
        for layer in self.layers:
            for part in layer:
                part.fill_(LOST_VALUE)

    def empty_cached(self, blocks: list[int]) -> None:
        """A cached prefix leaves these blocks.

        Raises:
            ValueError: a request holds one of them.
        """
        held = [block for block in blocks if self.holders[block]]
        if held:
            raise ValueError(f"blocks {held} are held by requests and were to be given up")
        self._empty(blocks)

    def count_holder(self, blocks: list[int]) -> None:
        """One request more holds these cached blocks."""
        self.holders[blocks] += 1

    def begin_table(self, request_id: int, blocks: list[int]) -> None:
        """Begin a request with blocks whose holders count it already."""
        if blocks:
            self._tables[request_id] = blocks

    def keep_in_table(
        self, request_id: int, first: int, count: int, known: list[int] | None
    ) -> list[int]:
        """Turn blocks of a request into a cached prefix, or take the known one in their place.

        Args:
            request_id: who holds them.
            first: of its blocks.
            count: how many.
            known: blocks that hold the same tokens; its own copy is given up.

        Returns:
            The blocks that are cached.
        """
        table = self._table(request_id)
        own = table[first : first + count]
        if known is None:
            self.owner[own] = CACHED
            return own
        self.count_holder(known)
        table[first : first + count] = known
        self.holders[own] -= 1
        self._empty(own)
        return known

    def flush(self) -> None:
        """Give up every cached block that nobody holds."""
        while (block := self.prefixes.evict()) is not None:
            self._empty([block])

    def free(self, request_id: int) -> None:
        """Give all blocks of a request back.

        Raises:
            ValueError: the request holds none.
        """
        table = self._table(request_id)
        del self._tables[request_id]
        self._stored.pop(request_id, None)
        self._num_frees += 1
        if self.on_free is not None:
            self.on_free(request_id)
        if self.corrupt == Corruption(kind="skip_free", index=self._num_frees - 1):
            return
        cached = (self.owner[table] == CACHED).tolist()
        self.holders[table] -= 1
        for block, is_cached in zip(reversed(table), reversed(cached), strict=True):
            if is_cached and self.keeps_order and not self.holders[block]:
                self.prefixes.released(block)
        self._empty([block for block, kept in zip(table, cached, strict=True) if not kept])

    def _take(self, block: int) -> None:
        self.holders[block] += 1
        self.prefixes.taken(block)

    def _empty(self, blocks: list[int]) -> None:
        """What these blocks hold is gone, and they may hold anything."""
        self.freed_tokens += int(self.written[blocks].sum())
        self.written[blocks] = False
        self.owner[blocks] = FREE

    def given_up(self, request_ids: Sequence[int]) -> int:
        """Blocks that nobody would hold any more if these requests were freed together."""
        tables = [self._tables.get(request_id, []) for request_id in request_ids]
        listed = Counter(block for table in tables for block in table)
        held = self.holders[list(listed)].tolist() if listed else []
        return sum(count == most for count, most in zip(listed.values(), held, strict=True))

    def stored_tokens(self, request_id: int) -> int:
        """Tokens of a request that are in the cache, counted from `written`."""
        return int(self.written[self._table(request_id)].sum())

    def block_table(self, request_id: int) -> Tensor:
        """Blocks of a request in the order of its tokens, int32 [blocks]."""
        return torch.tensor(self._table(request_id), dtype=torch.int32)

    def block_tables(self, request_ids: Sequence[int]) -> Tensor:
        """Block tables of several requests, int32 [requests, most blocks], padded with block 0."""
        tables = [self._table(request_id) for request_id in request_ids]
        width = max(map(len, tables), default=0)
        rows = [table + [0] * (width - len(table)) for table in tables]
        return torch.tensor(rows, dtype=torch.int32).view(len(tables), width)

    def slots(self, request_id: int, start: int, count: int) -> list[int]:
        """Slots of `count` tokens of a request from position `start` on.

        Raises:
            ValueError: the request has no room for them.
        """
        table, size = self._table(request_id), self.block_size
        if start < 0 or start + count > len(table) * size:
            raise ValueError(
                f"tokens {start} to {start + count} of request {request_id} are outside its "
                f"{len(table)} blocks of {size}; allocate {start + count} tokens first"
            )
        return [table[at // size] * size + at % size for at in range(start, start + count)]

    def begin_write(self, slot_mapping: Tensor) -> Tensor:
        """Count the slots that a forward pass is about to write, and return those it may write.

        Args:
            slot_mapping: int64 [tokens] on the CPU; FREE for a token that is not to be stored.
        """
        fault, rows = self.corrupt, (slot_mapping >= 0).nonzero()[:, 0]
        if fault is not None and fault.kind == "drop_copy":
            struck = fault.index - self.written_tokens
            if 0 <= struck < len(rows):
                slot_mapping = slot_mapping.index_fill(0, rows[struck], FREE)
                self.corrupt = None
        stored = slot_mapping[slot_mapping >= 0]
        self.written_tokens += len(stored)
        self.written.view(-1)[stored] = True
        return slot_mapping

    def count_read(self, context_lengths: Tensor) -> None:
        """Count the contexts that a forward pass gathers, int32 [sequences] on the CPU."""
        self.read_tokens += int(context_lengths.sum())

    def check(self) -> None:
        """Assert that tables and tensors agree: a block is held by the requests that list it.

        A block that is not cached is listed once, by its owner. Blocks owned by a request without a
        table are a leak, and asserted against as well.
        """
        listed = [(block, request) for request, table in self._tables.items() for block in table]
        counts = torch.bincount(
            torch.tensor([block for block, _ in listed], dtype=torch.int64),
            minlength=self.num_blocks,
        )
        own = [(block, request) for block, request in listed if int(self.owner[block]) != CACHED]
        assert len({block for block, _ in own}) == len(own), "a block is in two tables"
        assert all(int(self.owner[block]) == request for block, request in own)
        owned = int((self.owner >= 0).sum())
        assert owned == len(own), f"{owned - len(own)} blocks are owned by no live request"
        assert torch.equal(counts, self.holders), "a block is held by another number of requests"
        assert not bool(self.written[self.owner == FREE].any()), "a free block holds tokens"

    def _table(self, request_id: int) -> list[int]:
        if request_id not in self._tables:
            raise ValueError(f"request {request_id} holds no blocks; allocate some first")
        return self._tables[request_id]
