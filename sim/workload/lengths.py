"""Lengths of prompts and answers drawn from a distribution, shared by the generated workloads."""

import math
import warnings
from abc import ABC
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from sim.workload.base import Workload
from sim.workload.checks import require_count, require_positive

MAX_TOKENS = 2**31 - 1
"""No prompt or answer is longer: a larger number is a mistake, and int64 sums stay safe."""


class LengthDistribution(Enum):
    """How lengths spread around their mean. Member names are what the command line takes."""

    fixed = "fixed"
    uniform = "uniform"
    exponential = "exponential"
    lognormal = "lognormal"


@dataclass(kw_only=True)
class LengthWorkload(Workload, ABC):
    """A workload whose lengths are drawn: inputs and outputs independently, one kind for both."""

    input_tokens: int
    """Mean length of a prompt, before the limits (tokens)."""
    output_tokens: int
    """Mean length of an answer, before the limits (tokens)."""
    lengths: LengthDistribution = LengthDistribution.fixed
    """Distribution of the lengths: fixed, uniform, exponential or lognormal."""
    length_cv: float | None = None
    """Standard deviation over mean of the lengths; uniform and lognormal need it (ratio)."""
    min_tokens: int = 1
    """Shortest prompt and answer: what is drawn below is raised to it (tokens)."""
    max_tokens: int | None = None
    """Longest prompt and answer: what is drawn above is cut to it (tokens)."""

    def __post_init__(self) -> None:
        """Refuses means, limits and spreads that no distribution can have."""
        super().__post_init__()
        require_count("min_tokens", self.min_tokens, 1)
        top = MAX_TOKENS if self.max_tokens is None else self.max_tokens
        if not self.min_tokens <= top <= MAX_TOKENS:
            raise ValueError(
                f"max_tokens={top} must lie between min_tokens={self.min_tokens} and {MAX_TOKENS}; "
                f"try max_tokens={max(self.min_tokens, 4096)}"
            )
        for name, mean in (("input", self.input_tokens), ("output", self.output_tokens)):
            if not self.min_tokens <= mean <= top:
                raise ValueError(
                    f"{name}_tokens={mean} is a mean and must lie between "
                    f"min_tokens={self.min_tokens} and max_tokens={top}; "
                    f"try {name}_tokens={min(max(mean, self.min_tokens), top)}"
                )
        self._check_spread()

    def _check_spread(self) -> None:
        needed = self.lengths in (LengthDistribution.uniform, LengthDistribution.lognormal)
        if self.length_cv is None:
            if needed:
                raise ValueError(
                    f"lengths={self.lengths.name} needs length_cv (standard deviation over mean); "
                    "try length_cv=0.5"
                )
            return
        require_positive("length_cv", self.length_cv, 0.5)
        if not needed:
            warnings.warn(
                f"length_cv={self.length_cv} has no effect with lengths={self.lengths.name}; "
                "leave it out, or choose lengths=lognormal",
                stacklevel=4,
            )
        elif self.lengths is LengthDistribution.uniform and self.length_cv * math.sqrt(3) > 1:
            raise ValueError(
                f"length_cv={self.length_cv} must be at most {1 / math.sqrt(3):.3f} with "
                "lengths=uniform (no length is negative); try lengths=lognormal"
            )

    def draw_lengths(self, rng: np.random.Generator, mean: int, count: int) -> NDArray[np.float64]:
        """Lengths of `count` requests before rounding and limits; drawing in parts is the same."""
        match self.lengths:
            case LengthDistribution.fixed:
                return np.full(count, float(mean))
            case LengthDistribution.exponential:
                return mean * rng.standard_exponential(count)
            case LengthDistribution.uniform:
                # A uniform variable's half-width is sqrt(3) standard deviations.
                half_width = math.sqrt(3) * mean * (self.length_cv or 0.0)
                return mean + half_width * (2 * rng.random(count) - 1)
            case LengthDistribution.lognormal:
                return lognormal(rng, mean, self.length_cv or 0.0, count)

    def whole_tokens(self, drawn: NDArray[np.float64]) -> NDArray[np.int64]:
        """Lengths rounded to whole tokens and held between the limits."""
        top = MAX_TOKENS if self.max_tokens is None else self.max_tokens
        return np.clip(np.rint(drawn), self.min_tokens, top).astype(np.int64)

    def answers(self, drawn: NDArray[np.float64]) -> NDArray[np.int64]:
        """Like `whole_tokens`, and ended at the limit that each request states."""
        return np.minimum(self.whole_tokens(drawn), self.max_output_tokens or MAX_TOKENS)


def lognormal(rng: np.random.Generator, mean: float, cv: float, count: int) -> NDArray[np.float64]:
    """Lengths of mean `mean` and standard deviation `cv * mean`; drawing in parts is the same."""
    variance = math.log1p(cv**2)
    return np.exp(math.log(mean) - variance / 2 + math.sqrt(variance) * rng.standard_normal(count))
