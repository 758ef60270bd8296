"""What a knowledge cache is made of on both panels: its decisions, its tiers, its tree."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from sim.policies.batching.base import Batching
from sim.policies.cache_eviction.base import BoundEviction, CacheEviction
from sim.policies.request_order.base import RequestOrder
from sim.policies.retrieval_overlap.base import RetrievalOverlap
from sim.state.knowledge_prefixes import KnowledgePrefixes
from sim.state.knowledge_tree import KnowledgeTree, Move, MoveKind
from sim.workload.knowledge import Documents

TO_HOST = (MoveKind.swap_out, MoveKind.replicate)
COPIED = (*TO_HOST, MoveKind.load)


class Rules(NamedTuple):
    """Every decision of a knowledge cache."""

    batching: Batching
    cache_eviction: CacheEviction
    request_order: RequestOrder
    retrieval_overlap: RetrievalOverlap


class Tiers(NamedTuple):
    """Where KV of documents is kept, and what it costs to compute and to move."""

    documents: Documents
    host_blocks: int
    prefill_s: Callable[[int, int], float]
    """What the eviction rule knows of a prefill's seconds, by (cached, new) tokens."""
    copy_s: Callable[[int], float]
    """Seconds to copy the blocks of one document, so many, either way."""
    reuse: bool = True
    replicate_from: int | None = None


def tree_of(rules: Rules, tiers: Tiers, block_size: int) -> KnowledgePrefixes | None:
    """An empty knowledge tree for one replica, on either panel; None where nothing is reused."""
    if not tiers.reuse:
        return None
    tree = KnowledgeTree(
        BoundEviction(rules.cache_eviction), tiers.host_blocks, tiers.replicate_from
    )
    documents = tiers.documents
    return KnowledgePrefixes(
        tree, block_size, documents.tokens.tolist(), documents.system_tokens, tiers.prefill_s
    )


def loses(num_running: int, prefixes: KnowledgePrefixes | None) -> bool:
    """Whether anything is lost when the KV on the GPU is; if not, nothing is noted."""
    return bool(num_running or (prefixes is not None and prefixes.tree.gpu_used))


def copied_blocks(moves: Iterable[Move]) -> tuple[int, int]:
    """Blocks that are copied to the host, and from it."""
    out = back = 0
    for move in moves:
        if move.kind in TO_HOST:
            out += move.blocks
        elif move.kind is MoveKind.load:
            back += move.blocks
    return out, back
