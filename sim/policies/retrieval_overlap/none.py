"""The search comes first, the prefill after it."""

from dataclasses import dataclass
from typing import ClassVar

from sim.policies.retrieval_overlap.base import Action, RetrievalOverlap, SearchView


@dataclass(kw_only=True)
class NoOverlap(RetrievalOverlap):
    """Generates when the search is over."""

    decides_early: ClassVar[bool] = False

    def staged(self, view: SearchView) -> Action:
        """Start at the end."""
        return Action(start=view.final)
