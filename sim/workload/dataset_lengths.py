# pyright: basic
"""Lengths of the prompts and answers of LoongServe's datasets, which are not published as lists.

Published (arXiv 2404.09526 and its artifact): the shortest and the longest prompt of each. All else
is derived or assumed, here and nowhere else:

L-Eval and LV-Eval: log-normal prompts, the middle 99.8 % of which is the published range; assumed.

ShareGPT: the published run of vLLM at 1 request/s had a TTFT of 73.0 ms, 21.32 ms per later token,
4,998 ms in all, 5.206 ms per token of prompt and answer, and 0.3745 ms of TTFT per prompt token.
Answers: (4,998 - 73.0) / 21.32 = 231 tokens on average. Prompts: a density that falls with
length**-0.25 gives 5.45 ms and 0.31 ms; log-normal ones as above would give 12.4 ms and 1.2 ms.

Answers: exponential, from 4 to 999 tokens, as the artifact drops others of ShareGPT; for the other
datasets assumed. L-Eval: SLOs are 25 times what an unloaded system takes, so that a prompt of the
median length and its answer take (3.5 - 1.8) / 25 ms more per token than the prompt alone, and 12.8
ms per token of the answer: 126 tokens, derived. LV-Eval: both SLOs are the same to rounding, which
leaves room for 60 tokens; 30 are assumed.

scipy comes without complete types.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from sim.seeding import generator
from sim.workload.base import CHUNK_ROWS, RequestColumns, Workload
from sim.workload.lengths import MAX_TOKENS
from sim.workload.poisson import Poisson

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SHORTEST_ANSWER, LONGEST_ANSWER = 4, 999
"""Tokens."""
SHAREGPT, L_EVAL, LV_EVAL = range(3)
"""Places in what has one entry a dataset."""
_MIDDLE = 3.09
"""Standard deviations on either side of 99.8 % of a normal variable."""


class PowerLaw(NamedTuple):
    """Lengths whose density falls with a power of them, cut to a range."""

    shortest: int
    longest: int
    exponent: float

    def quantiles(self, uniforms: Floats) -> Floats:
        """The lengths that uniform numbers stand for, not rounded."""
        power = 1 - self.exponent
        low, high = self.shortest**power, self.longest**power
        return (low + uniforms * (high - low)) ** (1 / power)


class LogNormal(NamedTuple):
    """Log-normal lengths whose middle 99.8 % is a range, and which are cut to it."""

    shortest: int
    longest: int

    @property
    def median(self) -> float:
        """The geometric mean of the ends (tokens)."""
        return math.sqrt(self.shortest * self.longest)

    @property
    def sigma(self) -> float:
        """Standard deviation of the logarithm."""
        return math.log(self.longest / self.shortest) / (2 * _MIDDLE)

    def quantiles(self, uniforms: Floats) -> Floats:
        """The lengths that uniform numbers stand for, not rounded."""
        from scipy.special import ndtr, ndtri  # only whoever draws waits for it

        below = ndtr(-_MIDDLE)
        return self.median * np.exp(self.sigma * ndtri(below + uniforms * (1 - 2 * below)))

    def density(self, lengths: Floats) -> Floats:
        """Relative chance of a token more or less of length; 0 outside the range."""
        away = np.log(lengths / self.median) / self.sigma
        inside = (lengths >= self.shortest) & (lengths <= self.longest)
        return np.where(inside, np.exp(-(away**2) / 2) / (lengths * self.sigma), 0.0)


PROMPTS: tuple[PowerLaw | LogNormal, ...] = (
    PowerLaw(4, 2_300, 0.25), LogNormal(2_700, 210_500), LogNormal(15_100, 497_300),
)  # fmt: skip
"""ShareGPT, L-Eval, LV-Eval."""


def whole_prompts(dataset: int, uniforms: Floats) -> Ints:
    """Prompts of one dataset in whole tokens, from its shortest to its longest."""
    lengths = PROMPTS[dataset]
    drawn = np.rint(lengths.quantiles(uniforms))
    return np.clip(drawn, lengths.shortest, lengths.longest).astype(np.int64)


@lru_cache(maxsize=64)
def _decay_tokens(mean: int) -> float:
    """Of an exponential that, cut to the answers' range and rounded down, has this mean."""
    from scipy.optimize import brentq  # only whoever draws waits for it

    span = LONGEST_ANSWER + 1 - SHORTEST_ANSWER
    # Rounding down takes half a token.
    above = mean + 0.5 - SHORTEST_ANSWER

    def excess(decay: float) -> float:
        return decay - span * math.exp(-span / decay) / -math.expm1(-span / decay) - above

    return cast(float, brentq(excess, 1e-2, 1e6))


def whole_answers(means: Ints, uniforms: Floats) -> Ints:
    """Answers in whole tokens.

    Args:
        means: [requests] tokens.
        uniforms: [requests] numbers from 0 to below 1.
    """
    span = LONGEST_ANSWER + 1 - SHORTEST_ANSWER
    decay = np.array([_decay_tokens(mean) for mean in means.tolist()])
    drawn = SHORTEST_ANSWER - decay * np.log1p(uniforms * np.expm1(-span / decay))
    return np.minimum(drawn, LONGEST_ANSWER).astype(np.int64)


@dataclass(kw_only=True)
class DatasetLoad(Workload, ABC):
    """Poisson arrivals with lengths of LoongServe's datasets. Subclasses say of which."""

    rate_per_s: float
    """Mean requests per second."""
    num_requests: int | None = None
    """How many requests come; either this or `duration_s`."""
    duration_s: float | None = None
    """How long requests come (seconds); either this or `num_requests`."""
    exact_rate: bool = True
    """Stretch all gaps alike so that the last of `num_requests` comes at num_requests / rate_per_s,
    as the artifact does; without effect on `duration_s`."""
    sharegpt_output_tokens: int = 231
    """Mean answer of ShareGPT, derived from a published run (tokens)."""
    l_eval_output_tokens: int = 126
    """Mean answer of L-Eval, derived from its SLOs (tokens)."""
    lv_eval_output_tokens: int = 30
    """Mean answer of LV-Eval, assumed (tokens)."""

    def __post_init__(self) -> None:
        """Refuses a load that is not stated once, and means that no answers have."""
        super().__post_init__()
        most = (SHORTEST_ANSWER + LONGEST_ANSWER) // 2 - 1
        for name in ("sharegpt", "l_eval", "lv_eval"):
            mean = getattr(self, f"{name}_output_tokens")
            if not SHORTEST_ANSWER < mean <= most:
                raise ValueError(
                    f"{name}_output_tokens={mean} is the mean of answers of {SHORTEST_ANSWER} to "
                    f"{LONGEST_ANSWER} tokens and must be from {SHORTEST_ANSWER + 1} to {most}; "
                    f"try {name}_output_tokens={getattr(DatasetLoad, f'{name}_output_tokens')}"
                )
        self._load()

    @abstractmethod
    def prompts(self, uniforms: Floats, choices: Floats) -> tuple[Ints, Ints]:
        """Prompts in tokens, and the dataset whose answers they get, one entry a request each.

        Args:
            uniforms: [requests] numbers from 0 to below 1 that say how long prompts are.
            choices: [requests] more of them, that say of which dataset.
        """

    def _load(self) -> Poisson:
        """The arrivals; its lengths are of no use."""
        return Poisson(
            rate_per_s=self.rate_per_s, num_requests=self.num_requests, duration_s=self.duration_s,
            input_tokens=1, output_tokens=1,
        )  # fmt: skip

    def _stretch(self, seed: int) -> float:
        """By what arrivals are multiplied."""
        if self.num_requests is None or not self.exact_rate:
            return 1.0
        last_s = [float(chunk.arrival_s[-1]) for chunk in self._load().columns(seed)][-1]
        return self.num_requests / self.rate_per_s / last_s

    def columns(self, seed: int, chunk_rows: int = CHUNK_ROWS) -> Iterator[RequestColumns]:
        """All requests in order of arrival, in chunks (see `Workload.columns`).

        The same seed gives the same lengths at every rate.
        """
        inputs, datasets, outputs = (
            generator(seed, name) for name in ("input_lengths", "datasets", "output_lengths")
        )
        means = np.array(
            [self.sharegpt_output_tokens, self.l_eval_output_tokens, self.lv_eval_output_tokens]
        )
        top = self.max_output_tokens or MAX_TOKENS
        stretch = self._stretch(seed)
        for load in self._load().columns(seed, chunk_rows):
            count = len(load)
            prompts, of = self.prompts(inputs.random(count), datasets.random(count))
            answers = np.minimum(whole_answers(means[of], outputs.random(count)), top)
            yield RequestColumns(load.arrival_s * stretch, prompts, answers)
