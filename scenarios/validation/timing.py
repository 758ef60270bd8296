"""Question 4: how far is the predicted time from the measured one?

Poisson arrivals of short requests at a share of the calibrated capacity; every policy serves the
same requests, variants interleaved. The simulated panel knows the calibrated costs and nothing of
the runs.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from backends.executor import Executor
from backends.serving import serve
from scenarios.validation import reproduced
from scenarios.validation.intervals import Floats, two_stage
from scenarios.validation.verdict import Line, Verdict, judge_error
from sim.costs.base import IterationCost
from sim.costs.fitted import Fitted
from sim.engine import ReplicaLimits
from sim.metrics import request_times, token_times
from sim.models.work import IterationShape
from sim.policies.batching.base import Batching
from sim.processes.alone import simulate
from sim.processes.pace import Costed, Jitter, Jittered
from sim.trace import PREFILL, Trace
from sim.workload.poisson import Poisson
from sim.workload.recorded import Recorded
from sim.workload.source import Source

PROMPT_TOKENS = 32
OUTPUT_TOKENS = 12
LIMITS = ReplicaLimits(max_num_seqs=8, max_num_batched_tokens=256, block_size=16, num_blocks=128)
CONTEXT = 256
ACCEPT_KEYS = ("ttft_median_error", "e2e_median_error", "itl_p99_ratio_error")
"""What a study may name under `accept`."""
PREFILL_SHARE_NEEDED = 0.05
"""Least share of gaps with a prefill under `continuous` for which the ITL ratio means anything."""
FIGURES = {"ttft": "TTFT", "e2e": "latency"}
KINDS = {1: "prefill", 2: "decode", 3: "mixed"}


class Runs(NamedTuple):
    """One policy's runs of the same requests."""

    simulated: list[Trace]
    """One a repeat: with the costs that were calibrated beside its runs."""
    measured: list[Trace]
    """One a repeat."""
    costs: list[IterationCost]
    """Those of the simulated panel, one a repeat; none where they are not of iterations alone."""
    jittered: list[Trace]
    """As `simulated`, with the jitter that was calibrated: what a high percentile needs."""


def workload(rate_per_s: float, num_requests: int) -> Poisson:
    """The timed requests."""
    return Poisson(
        rate_per_s=rate_per_s, num_requests=num_requests,
        input_tokens=PROMPT_TOKENS, output_tokens=OUTPUT_TOKENS,
    )  # fmt: skip


class Panels(Protocol):
    """Both panels of a timed run."""

    def serve(self, source: Source, batching: Batching, seed: int) -> Trace:
        """The real one."""
        ...

    def beside(self, cost: Fitted, batching: Batching) -> Fitted:
        """The cost with what only shows where several batches are in flight."""
        ...

    def predict(
        self, source: Source, batching: Batching, cost: Fitted, jitter: Jitter | None = None
    ) -> Trace:
        """The simulated one; with jitter: on a machine that is never quite the same."""
        ...


class OneBatch(NamedTuple):
    """The panels of a replica with one batch in flight."""

    model: Executor

    def serve(self, source: Source, batching: Batching, seed: int) -> Trace:
        """The real one."""
        return serve(self.model, source, batching, LIMITS, seed=seed).trace

    def beside(self, cost: Fitted, batching: Batching) -> Fitted:
        """The cost: nothing runs beside the batch."""
        del batching
        return cost

    def predict(
        self, source: Source, batching: Batching, cost: Fitted, jitter: Jitter | None = None
    ) -> Trace:
        """The simulated one."""
        if jitter is None:
            return predict(source, batching, cost)
        return simulate(source, batching, LIMITS, Jittered(cost, jitter))


def capacity_per_s(
    policies: Iterable[Batching], cost: Fitted, panels: Panels | None = None
) -> float:
    """Requests a second that the slowest policy serves when all are there from the start."""
    count = 64
    saturated = Recorded(
        arrival_s=[0.0] * count, prompt_tokens=[PROMPT_TOKENS] * count,
        output_tokens=[OUTPUT_TOKENS] * count,
    )  # fmt: skip
    predicted = predict if panels is None else panels.predict
    traces = [predicted(Source(saturated, 0, CONTEXT), batching, cost) for batching in policies]
    return count / max(float(trace.iterations["end_s"].max()) for trace in traces)


def predict(source: Source, batching: Batching, cost: IterationCost) -> Trace:
    """The simulated panel of a timed run: what is to be expected of each request."""
    return simulate(source, batching, LIMITS, Costed(cost))


def time_lines(
    runs: Mapping[str, Runs], accept: Mapping[str, float], spread: float, seed: int
) -> list[Line]:
    """Every line of question 4.

    Args:
        runs: by policy.
        accept: largest relative errors, by `ACCEPT_KEYS`.
        spread: by how much the same iteration differs from itself when it is timed again.
        seed: of the bootstrap.
    """
    lines = [machine_line(spread)]
    for name, one in runs.items():
        for figure in FIGURES:
            lines += request_lines(name, figure, one, accept, seed)
    for name, one in runs.items():
        if one.costs:
            lines += iteration_lines(name, one, seed)
    if {"continuous", "chunked_prefill"} <= runs.keys():
        lines += _ratio_lines(runs["continuous"], runs["chunked_prefill"], accept, seed)
    return lines


def machine_line(spread: float) -> Line:
    """By how much the same iteration differs from itself when it is timed again."""
    return Line(
        question="time", metric="the machine: an iteration timed again deviates by",
        simulated="", measured=f"{spread:.1%}", error=None, verdict=Verdict.reported,
    )  # fmt: skip


def request_lines(
    name: str, figure: str, runs: Runs, accept: Mapping[str, float], seed: int
) -> list[Line]:
    """Median over requests of the relative error of their TTFT or end-to-end latency."""
    ours, theirs = (
        [getattr(request_times(trace), f"{figure}_s") for trace in side]
        for side in (runs.simulated, runs.measured)
    )
    errors = [np.abs(a / b - 1) for a, b in zip(ours, theirs, strict=True)]
    error, low, high = _median(errors, seed)
    accepted = accept.get(f"{figure}_median_error")
    again = reproduced.median_error(theirs)
    line = Line(
        question="time", metric=f"{name}: {FIGURES[figure]}, median error of a request",
        simulated=f"{np.median(ours):.3f} s", measured=f"{np.median(theirs):.3f} s",
        error=error, low=low, high=high, accepted=accepted,
        verdict=judge_error(error, low, high, accepted, again),
    )  # fmt: skip
    return [line, *_again_lines(f"{name}: {FIGURES[figure]}", again)]


def _again_lines(what: str, error: float | None) -> list[Line]:
    """By how much the real panel misses itself; nothing for a single repeat."""
    if error is None:
        return []
    return [
        Line(
            question="time", metric=f"{what}, one real run against another",
            simulated="", measured="", error=error, verdict=Verdict.reported,
        )
    ]  # fmt: skip


def iteration_lines(name: str, runs: Runs, seed: int) -> list[Line]:
    """Median error of an iteration's duration, given its measured shape, by kind."""
    lines: list[Line] = []
    for bit, kind in KINDS.items():
        pairs = zip(runs.measured, runs.costs, strict=True)
        sides = [_durations(trace, bit, cost) for trace, cost in pairs]
        sides = [side for side in sides if len(side[0])]
        if not sides:
            continue
        errors = [np.abs(ours / theirs - 1) for ours, theirs in sides]
        error, low, high = _median(errors, seed)
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
    sides = (continuous.jittered, continuous.measured, chunked.jittered, chunked.measured)
    gaps = [
        [np.stack(four) for four in zip(*map(_gaps, traces), strict=True)]
        for traces in zip(*sides, strict=True)
    ]
    pooled = np.concatenate([row for repeat in gaps for row in repeat], axis=1)
    predicted, measured = _p99_ratios(pooled)
    error = _ratio_error(pooled)
    low, high = two_stage(gaps, _ratio_error, seed)
    accepted = accept.get("itl_p99_ratio_error")
    enough = share >= PREFILL_SHARE_NEEDED
    measured_ratios = [_p99_ratios(np.concatenate(repeat, axis=1))[1:] for repeat in gaps]
    again = reproduced.median_error([np.array(ratio) for ratio in measured_ratios])
    return [
        Line(
            question="time", metric="continuous: share of token gaps with a prefill",
            simulated="", measured=f"{share:.1%}", error=None, verdict=Verdict.reported,
            note=f"95 % interval {share_low:.1%} to {share_high:.1%}; "
            f"at least {PREFILL_SHARE_NEEDED:.0%} needed",
        ),
        Line(
            question="time", metric="chunked_prefill / continuous, p99 ITL",
            simulated=f"{predicted:.3f}", measured=f"{measured:.3f}", error=error,
            low=low, high=high, accepted=accepted,
            verdict=judge_error(error, low, high, accepted, again) if enough else Verdict.not_run,
            note="" if enough else "too few gaps contain a prefill",
        ),
        *_again_lines("p99 ITL ratio", again),
    ]  # fmt: skip


def prefill_share(traces: Sequence[Trace], seed: int) -> tuple[float, float, float]:
    """Share of token gaps in which a prompt was computed, with its bootstrap interval."""
    repeats: list[list[Floats]] = []
    for trace in traces:
        before = np.append(0, np.cumsum((trace.iterations["kind"] & PREFILL) > 0))
        end_s = trace.iterations["end_s"]
        rows: list[Floats] = []
        for request in trace.requests["request"].tolist():
            iteration = np.searchsorted(end_s, token_times(trace, request))
            rows.append((np.diff(before[iteration + 1]) > 0).astype(np.float64))
        repeats.append(rows)
    low, high = two_stage(repeats, lambda drawn: float(np.mean(drawn)), seed)
    return float(np.mean(np.concatenate([row for rows in repeats for row in rows]))), low, high


def _median(errors: Sequence[Floats], seed: int) -> tuple[float, float, float]:
    """Median over all entries of all repeats, with its interval."""
    samples = [list(repeat[:, None]) for repeat in errors]
    low, high = two_stage(samples, lambda drawn: float(np.median(drawn)), seed)
    return float(np.median(np.concatenate(errors))), low, high


def _gaps(trace: Trace) -> list[Floats]:
    """Gaps between the tokens of each request, in order of request id; all have equally many."""
    return [np.diff(token_times(trace, i)) for i in np.sort(trace.requests["request"]).tolist()]


def _p99_ratios(gaps: Floats) -> tuple[float, float]:
    """Chunked over continuous, simulated and measured.

    Args:
        gaps: rows continuous simulated, continuous measured, chunked simulated, chunked measured.
    """
    p99 = np.percentile(gaps, 99, axis=1)
    return float(p99[2] / p99[0]), float(p99[3] / p99[1])


def _ratio_error(gaps: Floats) -> float:
    predicted, measured = _p99_ratios(gaps)
    return abs(predicted / measured - 1)
