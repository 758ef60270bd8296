"""Question 4: how far is the predicted time from the measured one?

Poisson arrivals of short requests at a share of the calibrated capacity; every policy serves the
same requests, variants interleaved. The simulated panel knows the calibrated costs and nothing of
the runs.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from scenarios.validation.intervals import Floats, over_repeats, over_requests
from scenarios.validation.verdict import Line, Verdict, judge_error
from sim.costs.base import IterationCost
from sim.engine import ReplicaLimits
from sim.metrics import inter_token_gaps, request_times, token_times
from sim.models.work import IterationShape
from sim.policies.batching.base import Batching
from sim.processes.pace import Costed
from sim.processes.replica import simulate
from sim.trace import PREFILL, Trace
from sim.workload.poisson import Poisson
from sim.workload.recorded import Recorded
from sim.workload.source import Source

PROMPT_TOKENS = 32
OUTPUT_TOKENS = 12
LIMITS = ReplicaLimits(max_num_seqs=16, max_num_batched_tokens=512, block_size=16, num_blocks=128)
CONTEXT = 256
ACCEPT_KEYS = ("ttft_median_error", "e2e_median_error", "itl_p99_ratio_error")
"""What a study may name under `accept`."""
PREFILL_SHARE_NEEDED = 0.05
"""Least share of gaps with a prefill under `continuous` for which the ITL ratio means anything."""
KINDS = {1: "prefill", 2: "decode", 3: "mixed"}


class Runs(NamedTuple):
    """One policy's runs of the same requests."""

    simulated: list[Trace]
    """One a repeat: with the costs that were calibrated beside its runs."""
    measured: list[Trace]
    """One a repeat."""
    costs: list[IterationCost]
    """Those of the simulated panel, one a repeat."""


def workload(rate_per_s: float, num_requests: int) -> Poisson:
    """The timed requests."""
    return Poisson(
        rate_per_s=rate_per_s, num_requests=num_requests,
        input_tokens=PROMPT_TOKENS, output_tokens=OUTPUT_TOKENS,
    )  # fmt: skip


def capacity_per_s(policies: Iterable[Batching], cost: IterationCost) -> float:
    """Requests a second that the slowest policy serves when all are there from the start."""
    count = 64
    saturated = Recorded(
        arrival_s=[0.0] * count, prompt_tokens=[PROMPT_TOKENS] * count,
        output_tokens=[OUTPUT_TOKENS] * count,
    )  # fmt: skip
    traces = [predict(Source(saturated, 0, CONTEXT), batching, cost) for batching in policies]
    return count / max(float(trace.iterations["end_s"][-1]) for trace in traces)


def predict(source: Source, batching: Batching, cost: IterationCost) -> Trace:
    """The simulated panel of a timed run."""
    return simulate(source, batching, LIMITS, Costed(cost))


def time_lines(runs: Mapping[str, Runs], accept: Mapping[str, float], seed: int) -> list[Line]:
    """Every line of question 4."""
    lines: list[Line] = []
    for name, one in runs.items():
        lines += [_request_line(name, figure, one, accept, seed) for figure in ("ttft", "e2e")]
    for name, one in runs.items():
        lines += _iteration_lines(name, one, seed)
    if {"continuous", "chunked_prefill"} <= runs.keys():
        lines += _ratio_lines(runs["continuous"], runs["chunked_prefill"], accept, seed)
    return lines


def _request_line(
    name: str, figure: str, runs: Runs, accept: Mapping[str, float], seed: int
) -> Line:
    """Median over requests of the relative error of their TTFT or end-to-end latency."""
    ours, theirs = (
        [getattr(request_times(trace), f"{figure}_s") for trace in side]
        for side in (runs.simulated, runs.measured)
    )
    errors = [float(np.median(np.abs(a / b - 1))) for a, b in zip(ours, theirs, strict=True)]
    error, low, high = over_repeats(errors, seed)
    accepted = accept.get(f"{figure}_median_error")
    title = {"ttft": "TTFT", "e2e": "latency"}[figure]
    return Line(
        question="time", metric=f"{name}: {title} of a request, median error",
        simulated=f"{np.median(ours):.3f} s", measured=f"{np.median(theirs):.3f} s",
        error=error, low=low, high=high, accepted=accepted,
        verdict=judge_error(error, low, high, accepted),
    )  # fmt: skip


def _iteration_lines(name: str, runs: Runs, seed: int) -> list[Line]:
    """Median error of an iteration's duration, given its measured shape, by kind."""
    lines: list[Line] = []
    for bit, kind in KINDS.items():
        pairs = zip(runs.measured, runs.costs, strict=True)
        sides = [_durations(trace, bit, cost) for trace, cost in pairs]
        sides = [side for side in sides if len(side[0])]
        if not sides:
            continue
        errors = [float(np.median(np.abs(ours / theirs - 1))) for ours, theirs in sides]
        error, low, high = over_repeats(errors, seed)
        ours, theirs = (np.concatenate(side) for side in zip(*sides, strict=True))
        lines.append(
            Line(
                question="time", metric=f"{name}: {kind} iteration, median error",
                simulated=f"{np.median(ours) * 1e3:.1f} ms",
                measured=f"{np.median(theirs) * 1e3:.1f} ms",
                error=error, low=low, high=high,
                verdict=Verdict.reported, note=f"{len(theirs):,} iterations",
            )
        )  # fmt: skip
    return lines


def _durations(trace: Trace, bit: int, cost: IterationCost) -> tuple[Floats, Floats]:
    """Predicted and measured seconds of a real trace's iterations of one kind."""
    columns = [trace.decisions[field] for field in IterationShape._fields]
    chosen = trace.iterations["kind"] == bit
    shapes = np.stack(columns, axis=1)[chosen].tolist()
    predicted = np.array([cost.iteration_s(IterationShape(*row)) for row in shapes])
    spent = trace.iterations["end_s"] - trace.iterations["start_s"]
    return predicted, spent[chosen]


def _ratio_lines(
    continuous: Runs, chunked: Runs, accept: Mapping[str, float], seed: int
) -> list[Line]:
    """The p99 ITL of chunked_prefill over that of continuous: what the policy is about."""
    share, share_low, share_high = prefill_share(continuous.measured, seed)
    predicted, ratios = (
        [_p99_itl(one) / _p99_itl(other) for one, other in zip(ours, theirs, strict=True)]
        for ours, theirs in (
            (chunked.simulated, continuous.simulated), (chunked.measured, continuous.measured),
        )
    )  # fmt: skip
    errors = [abs(a / b - 1) for a, b in zip(predicted, ratios, strict=True)]
    error, low, high = over_repeats(errors, seed)
    accepted = accept.get("itl_p99_ratio_error")
    enough = share >= PREFILL_SHARE_NEEDED
    return [
        Line(
            question="time", metric="continuous: share of token gaps with a prefill",
            simulated="", measured=f"{share:.1%}", error=None, verdict=Verdict.reported,
            note=f"95 % interval {share_low:.1%} to {share_high:.1%}; "
            f"at least {PREFILL_SHARE_NEEDED:.0%} needed",
        ),
        Line(
            question="time", metric="chunked_prefill / continuous: ratio of p99 ITL",
            simulated=f"{np.median(predicted):.3f}", measured=f"{np.median(ratios):.3f}", error=error,
            low=low, high=high, accepted=accepted,
            verdict=judge_error(error, low, high, accepted) if enough else Verdict.not_run,
            note="" if enough else "too few gaps contain a prefill",
        ),
    ]  # fmt: skip


def prefill_share(traces: Sequence[Trace], seed: int) -> tuple[float, float, float]:
    """Share of token gaps in which a prompt was computed, with its bootstrap interval."""
    rows: list[Floats] = []
    for trace in traces:
        before = np.append(0, np.cumsum((trace.iterations["kind"] & PREFILL) > 0))
        end_s = trace.iterations["end_s"]
        for request in trace.requests["request"].tolist():
            iteration = np.searchsorted(end_s, token_times(trace, request))
            rows.append((np.diff(before[iteration + 1]) > 0).astype(np.float64))
    low, high = over_requests(rows, seed)
    return float(np.mean(np.concatenate(rows))), low, high


def _p99_itl(trace: Trace) -> float:
    return inter_token_gaps(trace).percentile(99)
