"""Least recently used: what no request has asked for longest leaves first. SGLang's rule."""

from dataclasses import dataclass
from typing import Any

from sim.policies.cache_eviction.base import CacheEviction
from sim.state.knowledge_node import NodeView, Tier


@dataclass(kw_only=True)
class Lru(CacheEviction):
    """Worth as much as its last use is recent."""

    def priority(self, memory: Any, tier: Tier, node: NodeView) -> float:
        """The number of its last use."""
        del memory, tier
        return float(node.last_use)
