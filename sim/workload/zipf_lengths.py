"""Prompts whose lengths are spread as a power law: many short ones and a few very long.

LoongServe (arXiv 2404.09526), Figure 12: lengths from 10 to below 200,000 tokens, each as likely as
length**-alpha, replaced by the nearest length that a dataset has. The lists are not published: here
lengths stay as drawn, and only answers are a dataset's.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sim.workload.checks import require_count, require_not_negative
from sim.workload.dataset_lengths import L_EVAL, LV_EVAL, PROMPTS, SHAREGPT, DatasetLoad, LogNormal
from sim.workload.lengths import MAX_TOKENS

MOST_LENGTHS = 10_000_000
"""A table has an entry for each."""


@lru_cache(maxsize=8)
def chance_up_to(alpha: float, shortest: int, longest: int) -> NDArray[np.float64]:
    """[lengths] chance of this length or a shorter one, from `shortest` to `longest` tokens."""
    weights = np.arange(shortest, longest + 1, dtype=np.float64) ** -alpha
    summed = np.add.accumulate(weights)
    summed /= summed[-1]
    summed.flags.writeable = False
    return summed


@dataclass(kw_only=True)
class ZipfLengths(DatasetLoad):
    """Poisson arrivals with prompts whose lengths follow Zipf's law, LoongServe's goodput study.

    Answers are those of the dataset with prompts of that length; where two have some, of either,
    each as likely as it has prompts there.
    """

    alpha: float = 1.0
    """Exponent: a length is as likely as length**-alpha; 0 is uniform."""
    min_tokens: int = 10
    """Shortest prompt (tokens)."""
    max_tokens: int = 199_999
    """Longest prompt (tokens)."""

    def __post_init__(self) -> None:
        """Refuses exponents below 0 and ranges without a length or with too many."""
        super().__post_init__()
        require_not_negative("alpha", self.alpha)
        require_count("min_tokens", self.min_tokens, 10)
        top = min(self.min_tokens + MOST_LENGTHS, MAX_TOKENS)
        if not self.min_tokens <= self.max_tokens < top:
            raise ValueError(
                f"max_tokens={self.max_tokens} must be at least min_tokens={self.min_tokens} and "
                f"below {top}; try max_tokens={max(self.min_tokens, 199_999)}"
            )

    def prompts(
        self, uniforms: NDArray[np.float64], choices: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See `DatasetLoad.prompts`."""
        table = chance_up_to(self.alpha, self.min_tokens, self.max_tokens)
        lengths = np.searchsorted(table, uniforms, side="right") + self.min_tokens
        return lengths, _dataset_of(lengths, choices)


def _dataset_of(lengths: NDArray[np.int64], choices: NDArray[np.float64]) -> NDArray[np.int64]:
    """Whose prompts are as long; between two ranges and beyond all, the nearer range's."""
    chats, middle, long = PROMPTS
    assert isinstance(middle, LogNormal)
    assert isinstance(long, LogNormal)
    nearest = np.clip(lengths, middle.shortest, long.longest).astype(np.float64)
    chances = middle.density(nearest), long.density(nearest)
    found = np.where(choices * (chances[0] + chances[1]) < chances[0], L_EVAL, LV_EVAL)
    return np.where(lengths <= (chats.longest + middle.shortest) / 2, SHAREGPT, found)
