"""Greedy dual size frequency (Cherkasova 1998), with a cost in proportion to the size.

RAGCache's baseline without prefix awareness: where every token of a document costs the same, cost
over size is a constant, and frequency against the clock is what is left (RAGCache eq. 1).
"""

from dataclasses import dataclass

from sim.policies.cache_eviction.base import CacheEviction, advance, new_clocks
from sim.state.knowledge_node import NodeView, Tier


@dataclass(kw_only=True)
class Gdsf(CacheEviction):
    """Priority = clock + frequency: old popularity is overtaken by the clock."""

    def init(self) -> list[float]:
        """The clocks of both tiers."""
        return new_clocks()

    def priority(self, memory: list[float], tier: Tier, node: NodeView) -> float:
        """Clock + frequency * cost / size, where cost / size is one."""
        return memory[tier] + node.frequency

    def evicted(self, memory: list[float], tier: Tier, priority: float) -> None:
        """The clock goes on."""
        advance(memory, tier, priority)
