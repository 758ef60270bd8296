"""The knowledge tree: KV of documents in their order, on the GPU and in host memory (RAGCache 5).

A node is a document behind the documents before it: [D1, D2] and [D2, D1] share nothing. It owns
the whole KV blocks that end within its document, so that blocks stay aligned and every path is an
ordinary block table; up to a block less one token is computed again where a path parts.

The tree only counts blocks. What it decides comes out as `Move`s, which the simulated panel costs
and the real one carries out.
"""

from collections.abc import Callable, Iterator
from enum import IntEnum
from heapq import heapify, heappop, heappush
from typing import NamedTuple, Protocol

from sim.state.knowledge_node import SYSTEM_PROMPT, Node, NodeView, Tier


class EvictionRule(Protocol):
    """A rule of `sim/policies/cache_eviction`, bound to its memory."""

    @property
    def priority(self) -> Callable[[Tier, NodeView], float]:
        """What a node is worth in a tier now."""
        ...

    @property
    def evicted(self) -> Callable[[Tier, float], None]:
        """To be told when a node of a priority has left a tier."""
        ...


class MoveKind(IntEnum):
    """What happens to the KV of a node."""

    insert = 1
    """Its blocks, which a request has computed, are kept on the GPU."""
    load = 2
    """Copied from host memory into blocks of the GPU."""
    swap_out = 3
    """Copied from the GPU into host memory; its blocks are free."""
    drop = 4
    """Its blocks on the GPU are free; a copy is in host memory, or there was no room for one."""
    forget = 5
    """Its copy in host memory is given up."""
    replicate = 6
    """Copied from the GPU into host memory ahead of need; its blocks stay."""


class Move(NamedTuple):
    """One step of the cache, in order."""

    kind: MoveKind
    node: int
    document: int
    blocks: int


Entry = tuple[float, int, int, Node]
"""Of a heap of those that may leave a tier: priority, last use, number of the entry, node. It is
void once any of it, or whether the node may leave, has changed."""


class KnowledgeTree:
    """Who is cached where, in two tiers, and who leaves first.

    A parent is never in a slower tier than its child: only leaves of a tier leave it. KV is copied
    to the host once; the copy stays until the node leaves the cache (swap-out-only-once).
    """

    def __init__(
        self, rule: EvictionRule, host_blocks: int, replicate_from: int | None = None
    ) -> None:
        """Make an empty tree.

        Args:
            rule: gives priorities.
            host_blocks: blocks that fit into the host tier; 0: there is none.
            replicate_from: uses after which the system prompt, or a document right behind it, gets
                its copy in host memory ahead of need, so that losing the GPU does not lose it;
                None: never.
        """
        self.root = Node(-1, None, 0, 0)
        self.root.gpu = True
        self.root.pins = 1  # it never leaves
        self.host_blocks, self.host_used = host_blocks, 0
        self.num_nodes = 0
        self.unheld = 0
        """Blocks on the GPU of nodes that no request holds."""
        self.gpu_used = 0
        self.moves: list[Move] = []
        """What was decided and not yet taken over by whoever carries it out."""
        self._rule, self._replicate_from = rule, replicate_from
        self._copies = 0
        """Host blocks of nodes that are on the GPU as well: they stay."""
        self._uses = self._offers = 0
        self._on_gpu: list[Entry] = []
        self._on_host: list[Entry] = []

    def node(self, parent: Node, document: int, blocks: int) -> Node:
        """The node of a document behind another one, made if it was never used."""
        if parent.children is None:
            parent.children = {}
        found = parent.children.get(document)
        if found is None:
            self.num_nodes += 1
            found = Node(document, parent, blocks, self.num_nodes)
            parent.children[document] = found
        return found

    def use(self, node: Node, cost_s: float | None) -> None:
        """A request uses a document: count it, and value it anew where it is.

        Args:
            node: of the document.
            cost_s: seconds a token of its prefill, where the document was not cached; None: it was.
        """
        self._uses += 1
        node.last_use = self._uses
        node.frequency += 1
        if cost_s is None:
            node.uses += 1
        else:
            node.uses = 1
            node.misses += 1
            node.cost_s += cost_s
        if node.gpu:
            node.gpu_priority = self._rule.priority(Tier.gpu, node.view())
        if node.host:
            node.host_priority = self._rule.priority(Tier.host, node.view())

    def keep_copy(self, node: Node) -> None:
        """Copy a node to the host ahead of need, if it is an upper one that is used often."""
        frequent = self._replicate_from is not None and node.frequency >= self._replicate_from
        if not (frequent and node.gpu and not node.host and self._first(node)):
            return
        if self._make_room(node.blocks):
            self._enter_host(node)
            self._move(MoveKind.replicate, node)

    def pin(self, node: Node) -> int:
        """Hold a cached node on the GPU; returns the blocks that were free and no longer are."""
        assert node.cached, "only what is cached is held"
        node.pins += 1
        if not node.gpu:
            self._enter_gpu(node)
            self._move(MoveKind.load, node)
            return node.blocks
        if node.pins == 1:
            self.unheld -= node.blocks
            return node.blocks
        return 0

    def unpin(self, node: Node) -> int:
        """No longer hold a node; returns the blocks that nobody holds any more."""
        node.pins -= 1
        if node.pins:
            return 0
        self.unheld += node.blocks
        self._offer(node)
        return node.blocks

    def insert(self, node: Node) -> None:
        """Keep the blocks that a request has computed for a node, and hold them for it."""
        node.pins = 1
        self._enter_gpu(node)
        self._move(MoveKind.insert, node)

    def shrink(self, room: int) -> int:
        """Evict from the GPU until at most `room` blocks there are without a holder.

        Returns:
            How many blocks were given up.
        """
        given_up = 0
        while self.unheld > max(room, 0):
            entry = heappop(self._on_gpu)
            if not _leaves_gpu(entry):
                continue
            node = entry[3]
            self._rule.evicted(Tier.gpu, node.gpu_priority)
            self._leave_gpu(node)
            given_up += node.blocks
        return given_up

    def lose_gpu(self) -> None:
        """All KV on the GPU is gone; what has its copy on the host, and its prefix there, stays.

        Raises:
            ValueError: a request still holds a node.
        """
        lost = [one for one in self.nodes() if one.gpu]
        for node in lost:
            if node.pins:
                raise ValueError(f"node {node.number} is held; pre-empt its {node.pins} requests")
        for node in lost:
            self._exit_gpu(node)
            self._move(MoveKind.drop, node)
        for node in list(self.nodes()):
            # Parents come first, so that a node whose prefix is lost goes with it.
            if node.host and not self._reachable(node):
                self._exit_host(node)
            elif node.host:
                self._offer(node)

    def nodes(self) -> Iterator[Node]:
        """All nodes that were ever used, parents before children."""
        stack = list(reversed((self.root.children or {}).values()))
        while stack:
            node = stack.pop()
            yield node
            if node.children:
                stack.extend(reversed(node.children.values()))

    def take_moves(self) -> list[Move]:
        """What was decided since the last call, in order."""
        moves, self.moves = self.moves, []
        return moves

    def _first(self, node: Node) -> bool:
        """Whether it is the system prompt or the first document, behind what the host has."""
        parent = node.parent
        if parent is None or parent is self.root:
            return parent is self.root
        return parent.parent is self.root and parent.document == SYSTEM_PROMPT and parent.host

    def _reachable(self, node: Node) -> bool:
        parent = node.parent
        return parent is self.root or (parent is not None and parent.cached)

    def _move(self, kind: MoveKind, node: Node) -> None:
        self.moves.append(Move(kind, node.number, node.document, node.blocks))

    def _enter_gpu(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        assert parent.gpu, "a parent is in the faster tier"
        if not node.cached:
            parent.cached_children += 1
        node.gpu = True
        parent.gpu_children += 1
        self.gpu_used += node.blocks
        self._copies += node.blocks if node.host else 0
        node.gpu_priority = self._rule.priority(Tier.gpu, node.view())

    def _exit_gpu(self, node: Node) -> None:
        """It is on the GPU no longer; it may be on the host."""
        parent = node.parent
        assert parent is not None
        node.gpu = False
        self.gpu_used -= node.blocks
        self.unheld -= node.blocks
        self._copies -= node.blocks if node.host else 0
        parent.gpu_children -= 1
        if not node.host:
            parent.cached_children -= 1
        self._offer(parent)

    def _leave_gpu(self, node: Node) -> None:
        """Evict from the GPU: to the host, if it has room or has a copy already."""
        kept = node.host or self._make_room(node.blocks)
        self._exit_gpu(node)
        if node.host:
            self._move(MoveKind.drop, node)
        elif kept:
            self._enter_host(node)
            self._move(MoveKind.swap_out, node)
        else:
            self._move(MoveKind.drop, node)
            self._forget_below(node)
        self._offer(node)

    def _enter_host(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        if not node.cached:
            parent.cached_children += 1
        node.host = True
        self.host_used += node.blocks
        self._copies += node.blocks if node.gpu else 0
        node.host_priority = self._rule.priority(Tier.host, node.view())

    def _exit_host(self, node: Node) -> None:
        """It is on the host no longer, and so out of the cache."""
        parent = node.parent
        assert parent is not None
        node.host = False
        self.host_used -= node.blocks
        parent.cached_children -= 1
        self._move(MoveKind.forget, node)
        self._offer(parent)

    def _make_room(self, blocks: int) -> bool:
        """Evict from the host until so many blocks fit; False, and nothing, where they cannot."""
        if blocks > self.host_blocks - self._copies:
            return False
        while self.host_used + blocks > self.host_blocks:
            entry = heappop(self._on_host)
            if not _leaves_host(entry):
                continue
            self._rule.evicted(Tier.host, entry[3].host_priority)
            self._exit_host(entry[3])
        return True

    def _forget_below(self, node: Node) -> None:
        """What is cached behind a node that has left the cache cannot be reached any more."""
        below = [node]
        for one in below:
            below += [child for child in (one.children or {}).values() if child.host]
        for one in reversed(below[1:]):
            self._exit_host(one)

    def _offer(self, node: Node) -> None:
        """Put a node among those that may leave the tier that it is in, if it may."""
        if node.pins:
            return
        if node.gpu:
            if node.gpu_children:
                return
            heap, priority = self._on_gpu, node.gpu_priority
        elif node.host and not node.cached_children:
            heap, priority = self._on_host, node.host_priority
        else:
            return
        self._offers += 1  # no two entries are equal, so that nodes are never compared
        heappush(heap, (priority, node.last_use, self._offers, node))
        if len(heap) > 64 + 4 * self.num_nodes:
            stands = _leaves_gpu if heap is self._on_gpu else _leaves_host
            heap[:] = [entry for entry in heap if stands(entry)]
            heapify(heap)


def _leaves_gpu(entry: Entry) -> bool:
    """Whether an entry of the GPU's heap still says how things are."""
    priority, last_use, _, node = entry
    return (
        node.gpu
        and not (node.pins or node.gpu_children)
        and node.last_use == last_use
        and node.gpu_priority == priority
    )


def _leaves_host(entry: Entry) -> bool:
    """Whether an entry of the host's heap still says how things are."""
    priority, last_use, _, node = entry
    return (
        node.host
        and not (node.gpu or node.pins or node.cached_children)
        and node.last_use == last_use
        and node.host_priority == priority
    )
