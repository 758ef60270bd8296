"""Arrivals that do not wait for answers: a constant rate, or several load stages in a row.

Gaps are drawn with mean one and mapped to seconds by the cumulative rate, so that a renewal process
keeps its shape when the rate changes (time-rescaling theorem).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sim.seeding import generator
from sim.workload.base import CHUNK_ROWS, RequestColumns
from sim.workload.checks import require_count, require_not_negative, require_positive
from sim.workload.lengths import LengthWorkload


@dataclass(kw_only=True)
class Stage:
    """A while of constant load."""

    rate_per_s: float
    """Mean requests per second; zero is a pause."""
    duration_s: float
    """How long the stage lasts (seconds)."""

    def __post_init__(self) -> None:
        """Refuses a negative rate and a stage without duration."""
        require_not_negative("stages.rate_per_s", self.rate_per_s)
        require_positive("stages.duration_s", self.duration_s, 60.0)


@dataclass(kw_only=True)
class OpenLoop(LengthWorkload, ABC):
    """Requests that come at a rate, whatever the system does. Subclasses say how gaps spread."""

    rate_per_s: float | None = None
    """Mean requests per second; left out when `stages` say it."""
    num_requests: int | None = None
    """How many requests come; either this or `duration_s`."""
    duration_s: float | None = None
    """How long requests come (seconds); either this or `num_requests`."""
    stages: list[Stage] = field(default_factory=list[Stage])
    """Load stages one after another, instead of the three fields above."""

    def __post_init__(self) -> None:
        """Refuses a load that is stated twice, or not at all."""
        super().__post_init__()
        require_positive("rate_per_s", self.rate_per_s)
        require_count("num_requests", self.num_requests)
        require_positive("duration_s", self.duration_s, 60.0)
        ends = (self.num_requests, self.duration_s)
        if self.stages:
            if (self.rate_per_s, *ends) != (None, None, None):
                raise ValueError(
                    f"stages={self.stages} state rate and duration themselves; set "
                    "rate_per_s, num_requests and duration_s to null"
                )
            if not any(stage.rate_per_s > 0 for stage in self.stages):
                raise ValueError(
                    f"stages={self.stages} must bring requests; give one of them rate_per_s > 0"
                )
        elif self.rate_per_s is None:
            raise ValueError("rate_per_s=None must be given without stages; try rate_per_s=1.0")
        elif (self.num_requests is None) == (self.duration_s is None):
            raise ValueError(
                f"num_requests={self.num_requests} and duration_s={self.duration_s}: exactly one "
                "must be given; set the other to null"
            )

    @abstractmethod
    def gaps(self, rng: np.random.Generator, count: int) -> NDArray[np.float64]:
        """The next gaps between requests, scaled to mean one; drawing in parts is the same."""

    def columns(self, seed: int, chunk_rows: int = CHUNK_ROWS) -> Iterator[RequestColumns]:
        """All requests in order of arrival, in chunks (see `Workload.columns`)."""
        arrivals = generator(seed, "arrivals")
        inputs = generator(seed, "input_lengths")
        outputs = generator(seed, "output_lengths")
        to_seconds = _Clock(self._load())
        num_left = self.num_requests
        reached = 0.0
        while num_left is None or num_left > 0:
            count = chunk_rows if num_left is None else min(chunk_rows, num_left)
            # One running sum over all chunks, so that where a chunk ends changes no value.
            sums = np.add.accumulate(np.concatenate(([reached], self.gaps(arrivals, count))))
            reached = float(sums[-1])
            arrival_s = to_seconds(sums[1:])
            kept = len(arrival_s)
            if kept:
                yield RequestColumns(
                    arrival_s,
                    self.whole_tokens(self.draw_lengths(inputs, self.input_tokens, kept)),
                    self.answers(self.draw_lengths(outputs, self.output_tokens, kept)),
                )
            if kept < count:
                return
            num_left = None if num_left is None else num_left - count

    def _load(self) -> list[tuple[float, float]]:
        """(rate, duration) of every stage; an endless one where a number of requests ends it."""
        if self.rate_per_s is None:
            return [(stage.rate_per_s, stage.duration_s) for stage in self.stages]
        return [(self.rate_per_s, np.inf if self.duration_s is None else self.duration_s)]


class _Clock:
    """Maps expected numbers of requests (the cumulative rate) to the instants that reach them."""

    def __init__(self, load: list[tuple[float, float]]) -> None:
        self._rate_per_s, duration_s = np.array(load, dtype=np.float64).T
        self._starts_s = np.concatenate(([0.0], np.add.accumulate(duration_s)))
        reached = np.add.accumulate(self._rate_per_s * duration_s)
        self._reached = np.concatenate(([0.0], reached))

    def __call__(self, expected: NDArray[np.float64]) -> NDArray[np.float64]:
        """Instants in seconds; those after the last stage are left out."""
        expected = expected[: np.searchsorted(expected, self._reached[-1], side="left")]
        # side="right" steps over pauses: their two ends have the same cumulative rate.
        stage = np.searchsorted(self._reached, expected, side="right") - 1
        into = (expected - self._reached[stage]) / self._rate_per_s[stage]
        # Rounding must not carry an instant past the end of its stage, or order would be lost.
        return np.minimum(self._starts_s[stage] + into, self._starts_s[stage + 1])
