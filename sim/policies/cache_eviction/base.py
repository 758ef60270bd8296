"""Cache eviction: which cached document leaves a tier of the knowledge tree first."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from sim.policies.base import Policy
from sim.state.knowledge_node import NodeView, Tier


@dataclass(kw_only=True)
class CacheEviction(Policy):
    """Gives every document in a tier a priority; of the leaves of the tier the lowest one leaves.

    The tree asks when a document comes into a tier and whenever a request uses it, and keeps the
    answer until then. Of equal priorities the one used longest ago leaves.
    """

    @abstractmethod
    def priority(self, memory: Any, tier: Tier, node: NodeView) -> float:
        """How much a document is worth there now. Changes nothing.

        Args:
            memory: what `init` made.
            tier: where the document is.
            node: what is known of it.
        """

    def evicted(self, memory: Any, tier: Tier, priority: float) -> None:
        """A document of this priority has left the tier.

        Args:
            memory: what `init` made; the only argument that may change.
            tier: which it left.
            priority: that it had.
        """
        del memory, tier, priority


class BoundEviction:
    """A rule with its memory, as the knowledge tree takes it."""

    def __init__(self, rule: CacheEviction) -> None:
        memory = rule.init()
        # Called several times a request: a partial costs less than a method that passes on.
        self.priority: Callable[[Tier, NodeView], float] = partial(rule.priority, memory)
        """See `CacheEviction`."""
        self.evicted: Callable[[Tier, float], None] = partial(rule.evicted, memory)
        """See `CacheEviction`."""


def new_clocks() -> list[float]:
    """A logical clock a tier (RAGCache section 5.1: GPU and host have separate ones)."""
    return [0.0] * len(Tier)


def advance(clocks: list[float], tier: Tier, priority: float) -> None:
    """Set the clock of a tier to the highest priority that has left it (RAGCache eq. 2)."""
    clocks[tier] = max(clocks[tier], priority)
