"""KV of documents in two tiers of real memory: blocks of the cache, and an arena in host memory.

The knowledge tree decides, from what the arenas show; here its moves are carried out and counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from backends.corruption import Corruption
from backends.kv_cache import PagedKVCache
from backends.observed import Sequence
from sim.knowledge_recorder import KnowledgeRecorder
from sim.state.knowledge_node import Node
from sim.state.knowledge_prefixes import KnowledgePrefixes
from sim.state.knowledge_tree import Move, MoveKind
from sim.state.prefix_cache import CachedPrefix

DocumentsOf = Callable[[int], tuple[int, ...]]
"""The documents in the prompt of a generation, by rank."""


class HostArena:
    """Keys and values of blocks that left the cache, in host memory."""

    def __init__(self, cache: PagedKVCache, num_blocks: int) -> None:
        pinned = any(part.is_cuda for part in cache.layers[0])
        self._layers = [
            tuple(
                torch.empty((num_blocks, *part.shape[1:]), dtype=part.dtype, pin_memory=pinned)
                for part in layer
            )
            for layer in cache.layers
        ]
        self._cache = cache
        self._free = list(range(num_blocks - 1, -1, -1))
        self.used = torch.zeros(num_blocks, dtype=torch.bool)
        """bool [blocks], those that hold a copy."""
        self.corrupt: Corruption | None = None
        self.bytes_out = self.bytes_back = 0
        """Payload copied to the host, and from it."""
        self._num_copies = 0

    def keep(self, blocks: list[int]) -> list[int]:
        """Copy blocks of the cache into the arena; returns where they are."""
        slots = [self._free.pop() for _ in blocks]
        self.used[torch.tensor(slots, dtype=torch.int64)] = True
        if self._copies_next():
            self.bytes_out += self._copy(slots, blocks, to_host=True)
        return slots

    def bring(self, slots: list[int], blocks: list[int]) -> None:
        """Copy what was kept into blocks of the cache."""
        if self._copies_next():
            self.bytes_back += self._copy(slots, blocks, to_host=False)

    def release(self, slots: list[int]) -> None:
        """What is there is not needed any more."""
        self.used[torch.tensor(slots, dtype=torch.int64)] = False
        self._free.extend(reversed(slots))

    def _copies_next(self) -> bool:
        self._num_copies += 1
        return self.corrupt != Corruption(kind="drop_copy", index=self._num_copies - 1)

    def _copy(self, slots: list[int], blocks: list[int], *, to_host: bool) -> int:
        """Copy blocks of all layers; returns their bytes."""
        count = 0
        here = torch.tensor(slots, dtype=torch.int64)  # of a document below a block: none
        there = torch.tensor(blocks, dtype=torch.int64)
        for host, layer in zip(self._layers, self._cache.layers, strict=True):
            for kept, part in zip(host, layer, strict=True):
                if to_host:
                    moved = part[there.to(part.device)]
                    kept[here] = moved.to(kept.device)
                else:
                    moved = kept[here]
                    part[there.to(part.device)] = moved.to(part.device)
                count += moved.numel() * moved.element_size()
        return count


class KnowledgeStore:
    """A `PromptStore` that keeps documents by their place in the knowledge tree."""

    def __init__(
        self, cache: PagedKVCache, prefixes: KnowledgePrefixes, host: HostArena,
        documents_of: DocumentsOf, recorder: KnowledgeRecorder,
    ) -> None:  # fmt: skip
        self._cache, self.prefixes, self.host = cache, prefixes, host
        self._documents_of, self._recorder = documents_of, recorder
        cache.keeps_order = False  # the tree knows who leaves first
        self._blocks: dict[int, list[int]] = {}
        """By node, its blocks in the cache."""
        self._slots: dict[int, list[int]] = {}
        """By node, its blocks in the arena."""
        self._took_s: dict[tuple[MoveKind, int], float] = {}
        """Seconds of the copies since the last note, by kind and node."""
        self._held: list[tuple[int, list[Node]]] = []
        """Requests that got a seat and whose blocks may have to be loaded first."""

    def submitted(self, sequence: Sequence) -> None:
        """Note the documents of a generation."""
        request_id = sequence.request.request_id
        self.prefixes.register(request_id, self._documents_of(request_id))

    def cached(self, sequence: Sequence) -> CachedPrefix:
        """The leading documents that are in a tier; loading them takes blocks of the cache."""
        return self.prefixes.cached(sequence.request.view(sequence.generated))

    def hold(self, sequence: Sequence) -> int:
        """Hold them; what is in host memory is loaded by `load`."""
        request_id = sequence.request.request_id
        found = self.prefixes.hold(sequence.request.view(sequence.generated))
        nodes = list(self.prefixes.held_nodes(request_id))
        for node in nodes:
            self._cache.count_holder(self._blocks.get(node.number, []))
        self._held.append((request_id, nodes))
        return found.tokens

    def load(self) -> None:
        """Bring what the requests admitted now found in host memory, and begin their tables."""
        if not self._held:
            return
        missing = {node.number: node for _, nodes in self._held for node in nodes
                   if node.number not in self._blocks}  # fmt: skip
        wanted = sum(node.blocks for node in missing.values())
        self._shrink(wanted)
        for node in missing.values():
            blocks = self._cache.take_cached(node.blocks)
            self._blocks[node.number] = blocks
            begin_s = time.perf_counter()
            self.host.bring(self._slots[node.number], blocks)
            self._took_s[MoveKind.load, node.number] = time.perf_counter() - begin_s
        for request_id, nodes in self._held:
            for node in nodes:
                if node.number in missing:
                    self._cache.count_holder(self._blocks[node.number])
            table = [block for node in nodes for block in self._blocks[node.number]]
            self._cache.begin_table(request_id, table)
        self._held = []

    def make_room(self, blocks: int, now_s: float) -> None:
        """Evict until so many blocks are empty; note what was decided with this batch."""
        self._shrink(blocks)
        self._note(now_s)

    def store(self, sequence: Sequence) -> None:
        """Keep the documents whose blocks are full now; of two copies the first one stays."""
        request_id = sequence.request.request_id
        first = len(self.prefixes.held_nodes(request_id))
        before = len(self.prefixes.tree.moves)
        self.prefixes.store(request_id, sequence.computed)
        moves = self.prefixes.tree.moves[before:]
        nodes = self.prefixes.held_nodes(request_id)
        at = sum(node.blocks for node in nodes[:first])
        for node in nodes[first:]:
            known = self._blocks.get(node.number)
            kept = self._cache.keep_in_table(request_id, at, node.blocks, known)
            self._blocks[node.number] = kept
            at += node.blocks
        for move in moves:  # copies ahead of need, now that their blocks are known
            self._carry_out(move)

    def leave(self, sequence: Sequence) -> None:
        """Keep what is complete, and hold it no longer."""
        if sequence.computed:
            self.store(sequence)
        self.prefixes.release(sequence.request.request_id)

    def forget(self, sequence: Sequence) -> None:
        """Its documents stay cached."""
        self.prefixes.forget(sequence.request.request_id)

    def finish(self, now_s: float) -> None:
        """Nobody comes any more: note what the last requests left, and that all is in its place."""
        self.check()
        assert not any(node.pins for node in self.prefixes.tree.nodes()), "nobody holds anything"
        self._note(now_s)

    def lose(self, now_s: float) -> None:
        """All KV on the device is gone; no request runs any more."""
        before = len(self.prefixes.tree.moves)
        self.prefixes.lose_gpu()
        self._cache.lose()
        for move in self.prefixes.tree.moves[before:]:
            self._carry_out(move)
        self._note(now_s)

    def check(self) -> None:
        """Assert that the tree and the arenas agree on what is where."""
        tree = self.prefixes.tree
        on_gpu = {node.number: node.blocks for node in tree.nodes() if node.gpu}
        on_host = {node.number: node.blocks for node in tree.nodes() if node.host}
        assert on_gpu == {number: len(blocks) for number, blocks in self._blocks.items()}
        assert on_host == {number: len(slots) for number, slots in self._slots.items()}
        assert int(self.host.used.sum()) == tree.host_used

    def _note(self, now_s: float) -> None:
        """Record what was looked up and moved since the last time."""
        self._recorder.looked_up(self.prefixes.take_lookups(), now_s)
        moves = self.prefixes.tree.take_moves()
        took_s = [self._took_s.get((move.kind, move.node), 0.0) for move in moves]
        self._recorder.moved(moves, took_s, now_s)
        self._took_s = {}

    def _shrink(self, wanted: int) -> None:
        """Evict until `wanted` blocks of the cache are empty, and carry the moves out."""
        tree = self.prefixes.tree
        before = len(tree.moves)
        self.prefixes.shrink(self._cache.free_blocks - wanted)
        for move in tree.moves[before:]:
            self._carry_out(move)

    def _carry_out(self, move: Move) -> None:
        if move.kind is MoveKind.forget:
            self.host.release(self._slots.pop(move.node))
            return
        if move.kind in (MoveKind.swap_out, MoveKind.replicate):
            begin_s = time.perf_counter()
            self._slots[move.node] = self.host.keep(self._blocks[move.node])
            self._took_s[move.kind, move.node] = time.perf_counter() - begin_s
        if move.kind in (MoveKind.swap_out, MoveKind.drop):
            self._cache.empty_cached(self._blocks.pop(move.node))
