"""The knowledge tree as a replica sees it: the prefix of a prompt that is cached in any tier."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

from sim.requests import RequestView
from sim.state.knowledge_node import SYSTEM_PROMPT, Node
from sim.state.knowledge_tree import KnowledgeTree
from sim.state.prefix_cache import NOTHING_CACHED, CachedPrefix


class Lookup(NamedTuple):
    """What a request found when it was admitted."""

    request_id: int
    gpu_documents: int
    host_documents: int
    missed_documents: int
    """Of its documents; the system prompt counts as none."""
    gpu_tokens: int
    host_tokens: int


class Path:
    """The documents of one request, and how far it holds them."""

    __slots__ = ("documents", "ends", "found", "held", "nodes", "seen", "stored", "used")

    def __init__(self, documents: tuple[int, ...], ends: list[int]) -> None:
        self.documents = documents
        self.ends = ends
        """Whole blocks up to the end of each."""
        self.held: list[Node] = []
        """Leading documents whose blocks it holds."""
        self.used = False
        """Whether it was counted; a request that comes back after a pre-emption is not again."""
        self.stored = False
        """Whether an iteration has computed some of it."""
        self.found = NOTHING_CACHED
        self.nodes: list[Node] = []
        """Of the cached prefix."""
        self.seen = -1
        """State of the tree at which `found` and `nodes` were looked up."""


class KnowledgePrefixes:
    """Looks documents up in the tree and holds them while requests run; see `Prefixes`."""

    def __init__(
        self,
        tree: KnowledgeTree,
        block_size: int,
        document_tokens: Sequence[int],
        system_tokens: int,
        prefill_s: Callable[[int, int], float],
    ) -> None:
        """Serve requests of one corpus.

        Args:
            tree: where KV is kept.
            block_size: tokens of a KV block.
            document_tokens: length of every document.
            system_tokens: of the system prompt in front of all documents; 0: there is none.
            prefill_s: estimated seconds of (cached, new) tokens, for the rules that weigh cost.
        """
        self.tree = tree
        self.lookups: list[Lookup] = []
        """Of requests admitted since they were last taken."""
        self._size = block_size
        self._tokens, self._system = document_tokens, system_tokens
        self._prefill_s = prefill_s
        self._paths: dict[int, Path] = {}
        self._changes = 0

    @property
    def unheld(self) -> int:
        """Cached blocks on the GPU without a holder."""
        return self.tree.unheld

    def register(self, request_id: int, documents: tuple[int, ...]) -> None:
        """Say which documents a request has in its prompt, by rank, before it is submitted."""
        whole = documents if not self._system else (SYSTEM_PROMPT, *documents)
        lengths = [self._system if one < 0 else int(self._tokens[one]) for one in whole]
        ends = [end // self._size for end in accumulate(lengths)]
        self._paths[request_id] = Path(whole, ends)

    def cached(self, request: RequestView) -> CachedPrefix:
        """The longest cached prefix of a request that does not run; loading it takes blocks."""
        path = self._paths[request.request_id]
        if path.seen != self._changes:
            path.nodes = nodes = self._cached_nodes(path)
            tokens = path.ends[len(nodes) - 1] * self._size if nodes else 0
            free = sum([node.blocks for node in nodes if not node.pins])
            path.found, path.seen = CachedPrefix(tokens, free), self._changes
        return path.found

    def hold(self, request: RequestView) -> CachedPrefix:
        """Hold what is cached, on the GPU, and count the use of every document."""
        path = self._paths[request.request_id]
        found = self.cached(request)
        nodes = list(path.nodes)
        self._changes += 1
        if not path.used:
            self._note(request.request_id, path, nodes)
        for node in nodes:
            self.tree.pin(node)
        path.held = nodes
        if not path.used:
            for node in nodes:
                self.tree.use(node, None)
            new = request.prefill_tokens - found.tokens
            cost_s = self._prefill_s(found.tokens, new) / new
            for node in self._nodes(path, nodes, len(path.documents)):
                self.tree.use(node, cost_s)
        path.used = True
        return found

    def store(self, request_id: int, tokens: int) -> tuple[int, int]:
        """Keep the documents whose blocks are computed; what another has stored is held instead."""
        path = self._paths[request_id]
        if path.stored and len(path.held) == len(path.ends):
            return 0, 0
        full, first = tokens // self._size, len(path.held)
        upto = first
        while upto < len(path.ends) and path.ends[upto] <= full:
            upto += 1
        copies = taken = 0
        for node in self._nodes(path, path.held, upto):
            self._changes += 1
            if node.gpu:
                copies += node.blocks
                taken += self.tree.pin(node)
            else:
                self.tree.insert(node)
            path.held.append(node)
        if not path.stored:
            # Not when it is admitted: that must take nothing from what others were promised.
            for node in path.held:
                self.tree.keep_copy(node)
            self._changes += 1
        path.stored = True
        return copies, taken

    def release(self, request_id: int) -> int:
        """Give up what a request holds; returns the blocks that nobody holds any more."""
        path = self._paths[request_id]
        self._changes += 1
        free = sum([self.tree.unpin(node) for node in reversed(path.held)])
        path.held = []
        return free

    def forget(self, request_id: int) -> None:
        """A request has left for good. What it cached stays."""
        self._paths.pop(request_id, None)

    def held_blocks(self, request_id: int) -> int:
        """Cached blocks that a request holds."""
        return sum([node.blocks for node in self._paths[request_id].held])

    def shared_blocks(self, request_ids: tuple[int, ...]) -> int:
        """Cached blocks held by some of these requests and by others too, once for each."""
        holders: dict[Node, int] = {}
        for request_id in request_ids:
            for node in self._paths[request_id].held:
                holders[node] = holders.get(node, 0) + 1
        return sum(
            node.blocks * (count - (count == node.pins)) for node, count in holders.items()
        )  # fmt: skip

    def shrink(self, room: int) -> int:
        """Evict from the GPU until at most `room` blocks there are without a holder."""
        if self.tree.unheld <= room:
            return 0
        self._changes += 1
        return self.tree.shrink(room)

    def lose_gpu(self) -> None:
        """All KV on the GPU is gone; nobody runs."""
        self._changes += 1
        self.tree.lose_gpu()

    def take_lookups(self) -> list[Lookup]:
        """What requests have found since the last call."""
        lookups, self.lookups = self.lookups, []
        return lookups

    def held_nodes(self, request_id: int) -> list[Node]:
        """The nodes whose blocks a request holds, in order."""
        return self._paths[request_id].held

    def _cached_nodes(self, path: Path) -> list[Node]:
        nodes: list[Node] = []
        node: Node | None = self.tree.root
        for document in path.documents:
            node = node.child(document)
            if node is None or not (node.gpu or node.host):
                break
            nodes.append(node)
        return nodes

    def _nodes(self, path: Path, before: Sequence[Node], upto: int) -> list[Node]:
        """The nodes of the documents after those `before`, made if they were never used."""
        node = before[-1] if before else self.tree.root
        nodes: list[Node] = []
        for at in range(len(before), upto):
            blocks = path.ends[at] - (path.ends[at - 1] if at else 0)
            node = self.tree.node(node, path.documents[at], blocks)
            nodes.append(node)
        return nodes

    def _note(self, request_id: int, path: Path, nodes: Sequence[Node]) -> None:
        gpu = host = gpu_blocks = host_blocks = 0
        for node in nodes:
            counts = node.document != SYSTEM_PROMPT
            if node.gpu:
                gpu += counts
                gpu_blocks += node.blocks
            else:
                host += counts
                host_blocks += node.blocks
        missed = len(path.documents) - (SYSTEM_PROMPT in path.documents) - gpu - host
        size = self._size
        self.lookups.append(
            Lookup(request_id, gpu, host, missed, gpu_blocks * size, host_blocks * size)
        )
