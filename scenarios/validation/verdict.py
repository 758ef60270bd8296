"""One line of the validation table, and the rule that judges it."""

from dataclasses import dataclass
from enum import Enum


class Verdict(Enum):
    """What a line says. Only a miss makes the command exit with 1."""

    passed = "passed"
    missed = "missed"
    too_noisy = "too noisy"
    not_run = "not run"
    reported = "reported"
    """A figure without an acceptance."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A comparison of the two panels."""

    question: str
    """decisions, bytes, numbers or time."""
    metric: str
    simulated: str
    measured: str
    error: float | None
    """A count of differences for exact questions, else relative."""
    low: float | None = None
    """95 % interval of the error."""
    high: float | None = None
    accepted: float | None = None
    verdict: Verdict
    note: str = ""


def judge_exact(differences: int) -> Verdict:
    """Exact questions pass without any difference."""
    return Verdict.missed if differences else Verdict.passed


def judge_error(
    error: float, low: float, high: float, accepted: float | None, spread: float = 0.0
) -> Verdict:
    """Judge an error with its interval.

    Too noisy: half the interval's width is over half the acceptance, or so is the spread; or the
    error is above the acceptance and the interval is not.

    Args:
        error: relative.
        low: of its 95 % interval.
        high: of its 95 % interval.
        accepted: largest error that passes; None only reports.
        spread: by how much the same iteration differs from itself when it is timed again.
    """
    if accepted is None:
        return Verdict.reported
    if max((high - low) / 2, spread) > accepted / 2:
        return Verdict.too_noisy
    if error <= accepted:
        return Verdict.passed
    return Verdict.missed if low > accepted else Verdict.too_noisy
