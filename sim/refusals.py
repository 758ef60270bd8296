"""Refuses what a plan is not combined with, with the value and the way out."""

from collections.abc import Iterable


def refuse_combined(subject: str, refused: Iterable[tuple[bool, str, str]]) -> None:
    """Refuse the first combination that holds.

    Args:
        subject: what is not combined, and what it does.
        refused: (whether it holds, the setting and its value, what to take instead).

    Raises:
        ValueError: one holds.
    """
    for holds, value, instead in refused:
        if holds:
            raise ValueError(f"{subject} and is not combined with {value}; take {instead}")
