"""Prefix-aware greedy dual size frequency: the rule of RAGCache (section 5.1, eq. 1 to 3).

A document behind a cached prefix is cheaper to compute again than one that stands alone. Its cost
per token is averaged over the requests that really had to compute it, each with what was cached
before it.
"""

from dataclasses import dataclass

from sim.policies.cache_eviction.base import CacheEviction, advance, new_clocks
from sim.state.knowledge_node import NodeView, Tier


@dataclass(kw_only=True)
class Pgdsf(CacheEviction):
    """Priority = clock + frequency * average cost per token that was not cached."""

    def init(self) -> list[float]:
        """The clocks of both tiers."""
        return new_clocks()

    def priority(self, memory: list[float], tier: Tier, node: NodeView) -> float:
        """See RAGCache eq. 1 with the average cost of eq. 3, in seconds a token."""
        return memory[tier] + node.frequency * node.average_cost_s

    def evicted(self, memory: list[float], tier: Tier, priority: float) -> None:
        """The clock goes on."""
        advance(memory, tier, priority)
