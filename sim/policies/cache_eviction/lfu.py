"""Least frequently used: what has been used least since it was cached leaves first."""

from dataclasses import dataclass
from typing import Any

from sim.policies.cache_eviction.base import CacheEviction
from sim.state.knowledge_node import NodeView, Tier


@dataclass(kw_only=True)
class Lfu(CacheEviction):
    """Worth as much as it was used in its present stay; once it has left, it counts from one."""

    def priority(self, memory: Any, tier: Tier, node: NodeView) -> float:
        """Uses since it came into the cache."""
        del memory, tier
        return float(node.uses)
