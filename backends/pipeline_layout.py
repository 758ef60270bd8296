"""Which rank is what in an expert pipeline: attention ranks first, then expert ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from backends.m2n import Format
from sim.models.architecture import Architecture
from sim.policies.expert_balance.base import Placement


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The ranks of a run, and what each message between them may hold."""

    num_attention: int
    num_expert_ranks: int
    num_micro_batches: int
    placement: Placement
    """Of the physical experts on the expert ranks."""
    max_tokens: int
    """Of one micro-batch on one attention rank."""

    @property
    def size(self) -> int:
        """All ranks."""
        return self.num_attention + self.num_expert_ranks

    @property
    def expert_ranks(self) -> range:
        """Ranks of the run that have experts."""
        return range(self.num_attention, self.size)

    def experts_of(self, node: int, layer: int) -> list[int]:
        """Logical experts of an expert node, slot by slot."""
        each = self.placement.slots_per_node
        row = self.placement.physical_to_logical[layer]
        return row[node * each : (node + 1) * each].tolist()

    def messages(self, config: Architecture, dtype: torch.dtype) -> Format:
        """What goes between the two kinds of ranks."""
        each = self.placement.slots_per_node
        # A token comes once for each of its experts that are here.
        rows = self.max_tokens * min(config.experts_per_token, each)
        return Format(config.hidden_size, dtype, each, rows)
