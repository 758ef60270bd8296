"""Which blocks are cached under which prefix, who holds them, and which goes first.

Automatic prefix caching as in vLLM's second engine (docs, "Automatic Prefix Caching"). There, every
KV block is an entry of its own. Here one entry is a run of blocks that have always been held and
released together, found by the hash of a trace (512 tokens, 32 blocks of 16), so that a prompt of
10,000 tokens costs twenty steps. An entry is cut in two where a prompt parts in its middle, and
loses blocks at its end when some are needed: what happens to each block is the same.
"""

from collections import deque
from typing import NamedTuple

from sim.requests import Request, RequestView


class CachedPrefix(NamedTuple):
    """What a replica has of a waiting request's prompt."""

    tokens: int
    """Tokens that need no computing: whole blocks, and never all of the request's tokens."""
    free_blocks: int
    """Of the free blocks, those that hold them: once the request is admitted they are not free."""


NOTHING_CACHED = CachedPrefix(0, 0)


class Entry:
    """Consecutive blocks of a prefix that are held by the same number of requests."""

    __slots__ = ("blocks", "following", "key", "refs", "released")

    def __init__(self, key: int, blocks: int, refs: int, released: int) -> None:
        self.key = key
        self.blocks = blocks
        self.refs = refs
        """Running requests that hold all of them."""
        self.released = released
        """Which release left them without a holder, while `refs` is 0."""
        self.following: Entry | None = None
        """The next blocks under the same key."""


UNBOUNDED = 1 << 40
"""End of the blocks under a request's own key: its answer is as long as it will be."""


class Chain:
    """The whole blocks of one request as a path of keys, and how far it holds them."""

    __slots__ = ("at", "ends", "found", "held", "keys", "seen")

    def __init__(self, keys: list[int], ends: list[int]) -> None:
        self.keys = keys
        self.ends = ends
        """Blocks up to the end of each key."""
        self.held = 0
        """Leading blocks that the request holds and that are cached."""
        self.at = 0
        """The key in which the next block lies."""
        self.found = NOTHING_CACHED
        self.seen = -1
        """State of the cache at which `found` was looked up."""


class PrefixCache:
    """Cached blocks of one replica.

    A request holds a leading part of its chain, so an entry is never held, nor released later, than
    the entries before it: what is without a holder can be dropped from the end of the prefix alone.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.unheld = 0
        """Cached blocks without a holder."""
        self._first: dict[int, Entry] = {}
        self._chains: dict[int, Chain] = {}
        self._released: deque[tuple[int, list[Entry]]] = deque()
        """What each release left without a holder, in the order of the prefix."""
        self._releases = 0
        self._changes = 0

    def cached(self, request: RequestView) -> CachedPrefix:
        """The longest cached prefix of a request that does not run."""
        chain = self._chain(request)
        if chain.seen != self._changes:
            most = (request.prefill_tokens - 1) // self.block_size
            chain.found, chain.seen = self._find(chain, most), self._changes
        return chain.found

    def hold(self, request: RequestView) -> CachedPrefix:
        """Take a reference to all blocks that `cached` finds; the request runs from now on."""
        found = self.cached(request)
        chain = self._chains[request.request_id]
        left = found.tokens // self.block_size
        while left:
            entry, _ = self._entry(chain)
            assert entry is not None, "what was found is gone"
            left -= self._take(chain, entry, min(left, chain.ends[chain.at] - chain.held))
        return found

    def store(self, request_id: int, tokens: int) -> tuple[int, int]:
        """Cache the blocks that are full now that a request has computed so many tokens.

        A block that another request has cached meanwhile is held instead of the own copy.

        Returns:
            Own copies that are given up, and of the blocks held instead those that were free.
        """
        chain = self._chains[request_id]
        full = tokens // self.block_size
        copies = taken = 0
        while chain.held < full:
            entry, last = self._entry(chain)
            wanted = min(full, chain.ends[chain.at]) - chain.held
            if entry is None:
                self._append(chain, last, wanted)
                continue
            before = self.unheld
            copies += self._take(chain, entry, wanted)
            taken += before - self.unheld
        return copies, taken

    def release(self, request_id: int) -> int:
        """Give up what a request holds; returns the blocks that nobody holds any more."""
        chain = self._chains[request_id]
        self._releases += 1
        self._changes += 1
        free: list[Entry] = []
        for entry in self._held(chain):
            entry.refs -= 1
            if not entry.refs:
                entry.released = self._releases
                free.append(entry)
        chain.held = chain.at = 0
        if not free:
            return 0
        self._released.append((self._releases, free))
        count = sum([entry.blocks for entry in free])
        self.unheld += count
        return count

    def forget(self, request_id: int) -> None:
        """A request has left for good. What it cached stays."""
        self._chains.pop(request_id, None)

    def held_blocks(self, request_id: int) -> int:
        """Cached blocks that a request holds."""
        return self._chains[request_id].held

    def shared_blocks(self, request_ids: tuple[int, ...]) -> int:
        """Cached blocks held by some of these requests and by others too, counted once for each.

        They are what would still be held if these requests gave up all they hold, plus what would
        be given up once for several.
        """
        holders: dict[int, int] = {}
        entries: dict[int, Entry] = {}
        total = 0
        for request_id in request_ids:
            chain = self._chains[request_id]
            total += chain.held
            for entry in self._held(chain):
                entries[id(entry)] = entry
                holders[id(entry)] = holders.get(id(entry), 0) + 1
        given_up = sum(entry.blocks for at, entry in entries.items() if holders[at] == entry.refs)
        return total - given_up

    def shrink(self, room: int) -> int:
        """Drop blocks without a holder until at most `room` are left; returns how many.

        Those released longest ago go first; of one release, the end of the prefix goes first.
        """
        excess = dropped = self.unheld - max(room, 0)
        if excess <= 0:
            return 0
        self._changes += 1
        while excess:
            release, entries = self._released[0]
            entry = entries[-1] if entries else None
            if entry is None or entry.refs or entry.released != release:
                # Taken again since; so were the ones before it in the prefix.
                self._released.popleft()
            elif entry.blocks > excess:
                entry.blocks -= excess
                excess = 0
            else:
                excess -= entry.blocks
                entries.pop()
                self._unlink(entry)
        self.unheld -= dropped
        return dropped

    def _held(self, chain: Chain) -> list[Entry]:
        """The entries that a chain holds. It may leave a key in its middle and go on in another."""
        held: list[Entry] = []
        start = 0
        for key, end in zip(chain.keys, chain.ends, strict=True):
            if start >= chain.held:
                break
            left, entry = min(end, chain.held) - start, self._first.get(key)
            while left > 0 and entry is not None:
                left -= entry.blocks
                held.append(entry)
                entry = entry.following
            start = end
        return held

    def _find(self, chain: Chain, most: int) -> CachedPrefix:
        get, found, free, start = self._first.get, 0, 0, 0
        for key, end in zip(chain.keys, chain.ends, strict=True):
            wanted = min(end, most) - start
            entry = get(key)
            while entry is not None and wanted > 0:
                blocks = min(entry.blocks, wanted)
                found += blocks
                wanted -= blocks
                if not entry.refs:
                    free += blocks
                entry = entry.following
            if found < end:
                break
            start = end
        return CachedPrefix(found * self.block_size, free)

    def _chain(self, request: Request | RequestView) -> Chain:
        chain = self._chains.get(request.request_id)
        if chain is None:
            chain = Chain(*_path(request, self.block_size))
            self._chains[request.request_id] = chain
        return chain

    def _entry(self, chain: Chain) -> tuple[Entry | None, Entry | None]:
        """The entry of the first block that a chain does not hold, and the one before it there."""
        while chain.ends[chain.at] == chain.held:
            chain.at += 1
        inside = chain.held - (chain.ends[chain.at - 1] if chain.at else 0)
        last, entry = None, self._first.get(chain.keys[chain.at])
        while entry is not None and inside:
            inside -= entry.blocks
            last, entry = entry, entry.following
        return entry, last

    def _take(self, chain: Chain, entry: Entry, most: int) -> int:
        """Hold an entry, or the first `most` of its blocks; returns how many."""
        self._changes += 1
        if entry.blocks > most:
            entry = self._cut(entry, most)
        if not entry.refs:
            self.unheld -= entry.blocks
        entry.refs += 1
        chain.held += entry.blocks
        return entry.blocks

    def _append(self, chain: Chain, last: Entry | None, blocks: int) -> None:
        """Cache new blocks of a request that holds all before them."""
        self._changes += 1
        key = chain.keys[chain.at]
        if last is not None and last.refs == 1:
            last.blocks += blocks
        else:
            entry = Entry(key, blocks, 1, 0)
            if last is None:
                self._first[key] = entry
            else:
                last.following = entry
        chain.held += blocks

    def _cut(self, entry: Entry, blocks: int) -> Entry:
        """Cut an entry in two; returns the new one of its first `blocks` blocks."""
        head = Entry(entry.key, blocks, entry.refs, entry.released)
        head.following = entry
        before = self._first[entry.key]
        if before is entry:
            self._first[entry.key] = head
        else:
            while before.following is not entry:
                assert before.following is not None, "the entry is not under its key"
                before = before.following
            before.following = head
        # The old entry stays the end: releases that list it go on meaning their last blocks.
        entry.blocks -= blocks
        return head

    def _unlink(self, entry: Entry) -> None:
        before = self._first[entry.key]
        if before is entry:
            del self._first[entry.key]
            return
        while before.following is not entry:
            assert before.following is not None, "the entry is not under its key"
            before = before.following
        before.following = None


def _path(request: Request | RequestView, block_size: int) -> tuple[list[int], list[int]]:
    """Keys of a request's whole blocks, and the number of blocks up to the end of each.

    A block lies under the hash that covers its last token. What no hash covers, the answer among
    it, lies under a key of the request's own: only the request itself finds it again, after a
    pre-emption.
    """
    size, prompt = request.hash_block_tokens, request.prompt_tokens
    full = prompt // block_size
    hashes = request.prefix_hashes
    if len(hashes) * size > prompt:
        hashes = hashes[: -(-prompt // size)]
    # Even keys are hashes and odd ones requests: the two never meet.
    keys = [2 * one for one in hashes]
    if size % block_size:
        ends = [end * size // block_size for end in range(1, len(keys) + 1)]
    else:
        step = size // block_size
        ends = list(range(step, step * len(keys) + 1, step))
    if ends and ends[-1] > full:
        ends[-1] = full
    keys.append(2 * request.request_id + 1)
    ends.append(UNBOUNDED)
    return keys, ends
