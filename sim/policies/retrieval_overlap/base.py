"""Retrieval overlap: whether a prompt is prefilled before its documents are certain."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from sim.policies.base import Policy


class SearchView(NamedTuple):
    """What is known of a request when a stage of its search has ended."""

    documents: tuple[int, ...]
    """Best ones so far, by rank."""
    previous: tuple[int, ...]
    """Best ones after the stage before; empty after the first."""
    generating: tuple[int, ...] | None
    """Documents with which it is being generated, or was; None: it is not."""
    final: bool
    """Whether the search is over and `documents` are the answer."""
    pool_size: int
    """Requests of the engine whose prefill is not complete."""


class Action(NamedTuple):
    """What becomes of the generation of a request."""

    stop: bool = False
    """End what is being generated; it takes effect after the iteration under way."""
    start: bool = False
    """Begin to generate with `documents`."""


@dataclass(kw_only=True)
class RetrievalOverlap(Policy):
    """Decides at every stage whether to generate with what was found so far."""

    decides_early: ClassVar[bool] = True
    """Whether it may do anything before the search is over; if not, it is asked at the end only."""

    @abstractmethod
    def staged(self, view: SearchView) -> Action:
        """What to do now. When `final`, the request must be generated with `documents` after it."""


def checked_action(rule: RetrievalOverlap, view: SearchView) -> Action:
    """What a rule decides, for both panels.

    Raises:
        ValueError: it stops or starts what cannot be, or a final answer is left without generation.
    """
    action = rule.staged(view)
    after = None if action.stop else view.generating
    if action.start and after is None:
        after = view.documents
    elif action.start:
        after = ()  # two at once
    wrong = action.stop and view.generating is None
    if wrong or after == () or (view.final and after != view.documents):
        raise ValueError(
            f"policy {type(rule).__name__}: {action} at {view}; it may stop what runs, start "
            "where nothing does, and must end with the final documents; mend the policy"
        )
    return action
