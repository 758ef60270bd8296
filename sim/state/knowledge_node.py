"""A document in its context: a node of the knowledge tree, and what policies see of it."""

from enum import IntEnum
from typing import NamedTuple

SYSTEM_PROMPT = -1
"""Number of the document that stands for the system prompt, in front of all others."""


class Tier(IntEnum):
    """Where KV is kept."""

    gpu = 0
    host = 1


class NodeView(NamedTuple):
    """What is known of a document behind the documents before it."""

    last_use: int
    """Number of the last use, of all uses of all documents."""
    uses: int
    """Requests that used it since it came into the cache."""
    frequency: int
    """Requests that used it since the start, cached or not."""
    average_cost_s: float
    """Seconds a token of the prefills that had to compute it, on average (RAGCache eq. 3)."""


class Node:
    """A document behind the documents on the way to the root. Kept for its counts once evicted."""

    __slots__ = (
        "blocks", "cached_children", "children", "cost_s", "document", "frequency", "gpu",
        "gpu_children", "gpu_priority", "host", "host_priority", "last_use", "misses", "number",
        "parent", "pins", "uses",
    )  # fmt: skip

    def __init__(self, document: int, parent: "Node | None", blocks: int, number: int) -> None:
        self.document = document
        self.parent = parent
        self.blocks = blocks
        """Whole KV blocks that end within the document, behind this prefix."""
        self.number = number
        """Nodes are numbered as they are first used."""
        self.children: dict[int, Node] | None = None
        self.gpu = self.host = False
        """Whether its KV is there; it may be in both."""
        self.pins = 0
        """Requests that hold its blocks on the GPU."""
        self.gpu_children = self.cached_children = 0
        """Children with KV on the GPU, and in any tier."""
        self.frequency = self.uses = self.misses = self.last_use = 0
        self.cost_s = 0.0
        """Sum of the costs a token of `misses` requests."""
        self.gpu_priority = self.host_priority = 0.0

    @property
    def cached(self) -> bool:
        """Whether its KV is in any tier."""
        return self.gpu or self.host

    def child(self, document: int) -> "Node | None":
        """The node of a document behind this one, if it was ever used."""
        return None if self.children is None else self.children.get(document)

    def view(self) -> NodeView:
        """For policies."""
        average_s = self.cost_s / self.misses if self.misses else 0.0
        return NodeView(self.last_use, self.uses, self.frequency, average_s)
