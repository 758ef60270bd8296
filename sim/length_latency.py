"""Latencies by the tokens of a request: LoongServe's metrics, its SLOs, and what meets them.

As its artifact computes them (arXiv 2404.09526): per-token latency is the mean over requests of
end-to-end latency / (prompt + answer tokens), input latency that of TTFT / prompt tokens, and
output latency that of TPOT. The queue is included.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hardware_models.scaling import ScalingBase
from sim.metrics import Ints, RequestTimes
from sim.trace import Trace
from sim.workload.checks import require_positive
from sim.workload.long_context import Dataset


class LengthLatencies(NamedTuple):
    """Means over requests, in seconds per token; or each over its SLO."""

    per_token_s: float
    input_s: float
    output_s: float
    """Not a number where every answer is a single token."""


@dataclass(frozen=True, kw_only=True)
class LatencySlo:
    """The longest that each mean latency may be, in seconds per token."""

    per_token_s: float
    input_s: float
    output_s: float

    def __post_init__(self) -> None:
        for name in LengthLatencies._fields:
            require_positive(name, getattr(self, name))

    def shares(self, found: LengthLatencies) -> LengthLatencies:
        """Each latency over its SLO: 1 is just met."""
        return LengthLatencies(
            found.per_token_s / self.per_token_s,
            found.input_s / self.input_s,
            found.output_s / self.output_s,
        )


LOONGSERVE_SLOS = {
    Dataset.sharegpt: LatencySlo(per_token_s=0.092, input_s=0.020, output_s=0.320),
    Dataset.l_eval: LatencySlo(per_token_s=0.0035, input_s=0.0018, output_s=0.320),
    Dataset.lv_eval: LatencySlo(per_token_s=0.0025, input_s=0.0025, output_s=0.365),
    Dataset.mixed: LatencySlo(per_token_s=0.070, input_s=0.090, output_s=0.360),
}
"""Of Figure 10, from the artifact: 25 times what an unloaded system takes."""
LOONGSERVE_SLO_TWO_NODES = LatencySlo(per_token_s=0.065, input_s=0.064, output_s=0.500)
"""Of Figure 11, mixed, from the artifact's notebook; its script has 0.2 s for the output."""


@dataclass(kw_only=True)
class LengthSlo:
    """What a request must meet: a TTFT in proportion to an unloaded prefill of its length."""

    scaling: ScalingBase
    """Tells how long an unloaded prefill takes."""
    degree: int = 4
    """By how many instances."""
    times_unloaded: float = 25.0
    """TTFT may be so many times as long..."""
    least_ttft_s: float = 15.0
    """...and never has to be shorter than this."""
    tpot_s: float = 0.05
    """Longest mean time per later token."""

    def __post_init__(self) -> None:
        for name in ("times_unloaded", "least_ttft_s", "tpot_s"):
            require_positive(name, getattr(self, name))
        self.scaling.prefill_s(self.degree, 0, 0)

    def longest_ttft_s(self, prompt_tokens: Ints) -> NDArray[np.float64]:
        """[requests] the TTFT that each prompt may have."""
        one = self.scaling.prefill[self.degree - 1]
        tokens = prompt_tokens.astype(np.float64)
        unloaded_s = one.base_s + one.token_s * tokens + one.square_s * tokens**2
        return np.maximum(self.times_unloaded * unloaded_s, self.least_ttft_s)

    def met(self, times: RequestTimes, prompt_tokens: Ints) -> NDArray[np.bool_]:
        """[requests] which met it. A single token has no TPOT to miss."""
        in_time = times.ttft_s <= self.longest_ttft_s(prompt_tokens)
        return in_time & (np.isnan(times.tpot_s) | (times.tpot_s <= self.tpot_s))

    def attainment(self, times: RequestTimes, prompt_tokens: Ints) -> float:
        """Share of the requests that met it, by their count."""
        return float(self.met(times, prompt_tokens).mean())


def prompt_tokens_of(trace: Trace, times: RequestTimes) -> Ints:
    """[requests] prompt tokens of the requests of `times`, in their order."""
    ids = trace.requests["request"]
    order = np.argsort(ids, kind="stable")
    return trace.requests["prompt_tokens"][order][np.searchsorted(ids[order], times.request)]


def length_latencies(times: RequestTimes, prompt_tokens: Ints) -> LengthLatencies:
    """The three means; not a number without requests.

    Args:
        times: of the requests that count.
        prompt_tokens: [requests] of the same ones.
    """
    if not len(times.request):
        return LengthLatencies(*[float("nan")] * 3)
    tpot_s = times.tpot_s[~np.isnan(times.tpot_s)]
    return LengthLatencies(
        float((times.e2e_s / (prompt_tokens + times.output_tokens)).mean()),
        float((times.ttft_s / prompt_tokens).mean()),
        float(tpot_s.mean()) if len(tpot_s) else float("nan"),
    )
