"""Question 4: how far is the predicted time from the measured one?

Poisson arrivals of short requests at a share of the calibrated capacity; every policy serves the
same requests, variants interleaved. The simulated panel knows the calibrated costs and nothing of
the runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scenarios.validation.intervals import Sample, two_stage
from scenarios.validation.verdict import Line, Verdict, judge_error
from sim.costs.base import IterationCost
from sim.engine import ReplicaLimits
from sim.metrics import request_times, token_times
from sim.models.work import IterationShape
from sim.policies.batching.base import Batching
from sim.policies.batching.continuous import Continuous
from sim.processes.pace import Costed
from sim.processes.replica import simulate
from sim.trace import PREFILL, Trace
from sim.workload.poisson import Poisson
from sim.workload.recorded import Recorded
from sim.workload.source import Source

PROMPT_TOKENS = 32
OUTPUT_TOKENS = 12
LIMITS = ReplicaLimits(max_num_seqs=16, max_num_batched_tokens=128, block_size=16, num_blocks=128)
CONTEXT = 256
PREFILL_SHARE_NEEDED = 0.05
"""Least share of gaps with a prefill under `continuous` for which the ITL ratio means anything."""
KINDS = {1: "prefill", 2: "decode", 3: "mixed"}


class Run(NamedTuple):
    """One policy's run of one repeat on both panels."""

    simulated: Trace
    measured: Trace


@dataclass
class Runs:
    """All timed runs, by policy and then repeat."""

    by_policy: dict[str, list[Run]] = field(default_factory=dict[str, list[Run]])


def workload(rate_per_s: float, num_requests: int) -> Poisson:
    """The timed requests."""
    return Poisson(
        rate_per_s=rate_per_s, num_requests=num_requests,
        input_tokens=PROMPT_TOKENS, output_tokens=OUTPUT_TOKENS,
    )  # fmt: skip


def capacity_per_s(cost: IterationCost) -> float:
    """Requests a second that continuous batching serves when all are there from the start."""
    count = 64
    saturated = Recorded(
        arrival_s=[0.0] * count, prompt_tokens=[PROMPT_TOKENS] * count,
        output_tokens=[OUTPUT_TOKENS] * count,
    )  # fmt: skip
    trace = predict(Source(saturated, 0, CONTEXT), Continuous(), cost)
    return count / float(trace.iterations["end_s"][-1])


def predict(source: Source, batching: Batching, cost: IterationCost) -> Trace:
    """The simulated panel of a timed run."""
    return simulate(source, batching, LIMITS, Costed(cost))


def time_lines(
    runs: Runs, cost: IterationCost, accept: Mapping[str, float], seed: int
) -> list[Line]:
    """Every line of question 4."""
    lines: list[Line] = []
    for name, repeats in runs.by_policy.items():
        for figure in ("ttft", "e2e"):
            lines.append(_request_line(name, figure, repeats, accept, seed))
    for name, repeats in runs.by_policy.items():
        lines += _iteration_lines(name, repeats, cost, seed)
    if {"continuous", "chunked_prefill"} <= runs.by_policy.keys():
        lines += _ratio_lines(
            runs.by_policy["continuous"], runs.by_policy["chunked_prefill"], accept, seed
        )
    return lines


def _request_line(
    name: str, figure: str, repeats: Sequence[Run], accept: Mapping[str, float], seed: int
) -> Line:
    """Median over requests of the relative error of their TTFT or end-to-end latency."""
    pairs = [
        (getattr(request_times(run.simulated), f"{figure}_s"),
         getattr(request_times(run.measured), f"{figure}_s"))
        for run in repeats
    ]  # fmt: skip
    errors = [np.abs(ours / theirs - 1) for ours, theirs in pairs]
    error = float(np.median(np.concatenate(errors)))
    samples: list[list[Sample]] = [[row[None] for row in repeat] for repeat in errors]
    low, high = two_stage(samples, lambda chosen: float(np.median(chosen)), seed)
    accepted = accept.get(f"{figure}_median_error")
    title = {"ttft": "TTFT", "e2e": "end-to-end latency"}[figure]
    medians = [float(np.median(np.concatenate(side))) for side in zip(*pairs, strict=True)]
    return Line(
        question="time", metric=f"{name}: {title}, median error of a request",
        simulated=f"median {medians[0]:.3f} s", measured=f"median {medians[1]:.3f} s",
        error=error, low=low, high=high, accepted=accepted,
        verdict=judge_error(error, low, high, accepted),
    )  # fmt: skip


def _iteration_lines(
    name: str, repeats: Sequence[Run], cost: IterationCost, seed: int
) -> list[Line]:
    """Median error of an iteration's duration, given its measured shape, by kind."""
    lines: list[Line] = []
    for bit, kind in KINDS.items():
        predicted: list[NDArray[np.float64]] = []
        measured: list[NDArray[np.float64]] = []
        for run in repeats:
            columns = [run.measured.decisions[field] for field in IterationShape._fields]
            chosen = run.measured.iterations["kind"] == bit
            shapes = np.stack(columns, axis=1)[chosen].tolist()
            predicted.append(np.array([cost.iteration_s(IterationShape(*row)) for row in shapes]))
            spent = run.measured.iterations["end_s"] - run.measured.iterations["start_s"]
            measured.append(spent[chosen])
        if not sum(map(len, measured)):
            continue
        errors = [np.abs(a / b - 1) for a, b in zip(predicted, measured, strict=True)]
        samples: list[list[Sample]] = [[row[None] for row in repeat] for repeat in errors]
        low, high = two_stage(samples, lambda chosen: float(np.median(chosen)), seed)
        lines.append(
            Line(
                question="time", metric=f"{name}: {kind} iteration, median error",
                simulated=f"median {_milliseconds(predicted)}",
                measured=f"median {_milliseconds(measured)}",
                error=float(np.median(np.concatenate(errors))), low=low, high=high,
                verdict=Verdict.reported, note=f"{sum(map(len, measured)):,} iterations",
            )
        )  # fmt: skip
    return lines


def _ratio_lines(
    continuous: Sequence[Run], chunked: Sequence[Run], accept: Mapping[str, float], seed: int
) -> list[Line]:
    """The p99 ITL of chunked_prefill over that of continuous: what the policy is about."""
    share, share_low, share_high = prefill_share([run.measured for run in continuous], seed)
    samples = [
        [np.stack(gaps) for gaps in zip(*(_gaps(trace) for trace in (*one, *other)), strict=True)]
        for one, other in zip(continuous, chunked, strict=True)
    ]
    pooled = np.concatenate([row for repeat in samples for row in repeat], axis=1)
    predicted, measured = _p99_ratios(pooled)
    low, high = two_stage(samples, _ratio_error, seed)
    accepted = accept.get("itl_p99_ratio_error")
    error = abs(predicted / measured - 1)
    enough = share >= PREFILL_SHARE_NEEDED
    note = "" if enough else f"under {PREFILL_SHARE_NEEDED:.0%} of the gaps contain a prefill"
    return [
        Line(
            question="time", metric="continuous: share of token gaps with a prefill",
            simulated="", measured=f"{share:.1%} [{share_low:.1%}, {share_high:.1%}]", error=None,
            verdict=Verdict.reported, note=f"at least {PREFILL_SHARE_NEEDED:.0%} needed",
        ),
        Line(
            question="time", metric="chunked_prefill / continuous: ratio of p99 ITL",
            simulated=f"{predicted:.3f}", measured=f"{measured:.3f}", error=error,
            low=low, high=high, accepted=accepted, note=note,
            verdict=judge_error(error, low, high, accepted) if enough else Verdict.not_run,
        ),
    ]  # fmt: skip


def prefill_share(traces: Sequence[Trace], seed: int) -> tuple[float, float, float]:
    """Share of token gaps in which a prompt was computed, with its bootstrap interval."""
    samples: list[list[Sample]] = []
    for trace in traces:
        before = np.append(0, np.cumsum((trace.iterations["kind"] & PREFILL) > 0))
        end_s = trace.iterations["end_s"]
        rows: list[Sample] = []
        for request in np.sort(trace.requests["request"]).tolist():
            iteration = np.searchsorted(end_s, token_times(trace, request))
            rows.append((np.diff(before[iteration + 1]) > 0).astype(np.float64))
        samples.append(rows)
    share = float(np.mean(np.concatenate([row for rows in samples for row in rows])))
    low, high = two_stage(samples, lambda chosen: float(np.mean(chosen)), seed)
    return share, low, high


def _gaps(trace: Trace) -> list[NDArray[np.float64]]:
    """Gaps between the tokens of each request, in order of request id."""
    return [np.diff(token_times(trace, i)) for i in np.sort(trace.requests["request"]).tolist()]


def _p99_ratios(gaps: NDArray[np.float64]) -> tuple[float, float]:
    """Chunked over continuous, simulated and measured.

    Args:
        gaps: rows continuous simulated, continuous measured, chunked simulated, chunked measured.
    """
    p99 = np.percentile(gaps, 99, axis=1)
    return float(p99[2] / p99[0]), float(p99[3] / p99[1])


def _ratio_error(gaps: NDArray[np.float64]) -> float:
    predicted, measured = _p99_ratios(gaps)
    return abs(predicted / measured - 1)


def _milliseconds(parts: Sequence[NDArray[np.float64]]) -> str:
    return f"{np.median(np.concatenate(parts)) * 1e3:.1f} ms"
