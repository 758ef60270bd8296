"""Dynamic speculative pipelining (RAGCache section 5.3, algorithm 2).

A prefill begins with the provisional documents of a stage when they have changed and the engine has
room for it. It ends when they change again; what was right is not computed twice.
"""

from dataclasses import dataclass

from sim.policies.retrieval_overlap.base import Action, RetrievalOverlap, SearchView


@dataclass(kw_only=True)
class Speculative(RetrievalOverlap):
    """Generates with what was found so far, while few prefills are pending."""

    max_prefill_bs: int = 4
    """No speculation begins with so many prefills pending: the smaller of the batches that memory
    and the SMs allow."""

    def __post_init__(self) -> None:
        if self.max_prefill_bs < 1:
            raise ValueError(f"max_prefill_bs={self.max_prefill_bs} must be at least 1; try 4")

    def staged(self, view: SearchView) -> Action:
        """Follow the documents; what is final is always generated."""
        if view.generating == view.documents:
            return Action()
        changed = view.documents != view.previous
        room = view.pool_size < self.max_prefill_bs
        return Action(
            stop=view.generating is not None and (changed or view.final),
            start=view.final or (changed and room),
        )
