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


def not_run(question: Enum, why: str) -> Line:
    """A question that was not asked, or that has no answer here."""
    return Line(
        question=question.value, metric="", simulated="", measured="", error=None,
        verdict=Verdict.not_run, note=why,
    )  # fmt: skip


def judge_exact(differences: int) -> Verdict:
    """Exact questions pass without any difference."""
    return Verdict.missed if differences else Verdict.passed


def judge_error(
    error: float, low: float, high: float, accepted: float | None, reproduced: float | None = None
) -> Verdict:
    """Judge an error with its interval.

    Missed: the whole interval is above the acceptance, and above what the real panel makes of
    itself. Passed: the error is within the acceptance, and half the interval's width within half of
    it. Too noisy: anything else.

    Args:
        error: relative.
        low: of its 95 % interval.
        high: of its 95 % interval.
        accepted: largest error that passes; None only reports.
        reproduced: the same error of one real run as the prediction of another; None: not known.
    """
    if accepted is None:
        return Verdict.reported
    if low > max(accepted, reproduced or 0.0):
        return Verdict.missed
    precise = (high - low) / 2 <= accepted / 2
    return Verdict.passed if precise and error <= accepted else Verdict.too_noisy
