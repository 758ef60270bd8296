"""Question 4 for elastic instances: does a prefill take what its scaling base says?

Two ranks prefill prompts of several lengths, alone and together, in interleaved order. A base is
fitted to some of the lengths and judged on the others. Decode rounds of one and two masters are
timed between them. What it costs to keep KV elsewhere is compared pair by pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from backends.elastic_orders import Work
from backends.elastic_serving import ElasticRun, serve_elastic
from backends.weights import TINY_CONFIG
from hardware_models.scaling import DecodeScaling, PrefillScaling, ScalingBase
from scenarios.validation.elastic import tiny_scaling
from scenarios.validation.elastic_script import Job, OneAfterAnother, dealt
from scenarios.validation.intervals import Floats, two_stage
from scenarios.validation.verdict import Line, Verdict, judge_error
from sim.costs.elastic import DecodeWork, Scaled
from sim.elastic_profile import fitted_decode, fitted_prefill
from sim.elastic_trace import DECODE, PREFILL, ElasticTables
from sim.engine import ReplicaLimits
from sim.policies.elastic import ElasticPlan
from sim.workload.recorded import Recorded

CONFIG: dict[str, object] = TINY_CONFIG | {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip
"""Four million parameters: a prefill of some hundred tokens takes tens of milliseconds."""
CALIBRATED = (256, 448, 704, 1024)
JUDGED = (320, 576, 896)
"""Lengths of prompts: halves are multiples of 32, for which matrix products are prepared."""
DEGREES = (1, 2)
PASSES = 6
"""Of every length at every degree, in one run of the two ranks."""
PAIRED, PAIRS_A_PASS = 640, 2
"""Length of the prompts that are prefilled with and without scale-down, and how often."""
ROUNDS = 6
"""Of decoding, of every batch in a pass."""
CALIBRATED_BATCHES, JUDGED_BATCH = ((1, 512), (4, 256), (12, 64), (12, 192)), (8, 128)
"""Requests that decode together, and the tokens of each one's prompt."""
LIMITS = ReplicaLimits(max_num_seqs=16, max_num_batched_tokens=1024, block_size=1, num_blocks=4096)
ACCEPT_KEYS = ("prefill_error", "prefill_ratio_error", "round_error", "keep_share", "keep_error")
"""What a study may name under `accept`."""


class Timing(NamedTuple):
    """One job of one pass."""

    job: Job
    length: int
    prefill_s: float
    """Of the group: from its order until all members have reported."""
    round_s: list[float]


@dataclass(frozen=True)
class Repeat:
    """One run of the two ranks."""

    timings: list[Timing]
    work: list[Work]
    """Of every rank in every prefill."""
    base: ScalingBase
    """Fitted to the calibrated jobs: what the plan of the picture knows."""
    alone: list[ScalingBase]
    """Of each degree by itself. In a base of both, more instances never gain nothing, as they may
    on a machine whose cores are busy."""

    def prefills(self, degree: int, length: int, *, spread: bool = False) -> Floats:
        """Seconds of all prefills of one request with these sizes."""
        return prefills(self.timings, degree, length, spread=spread)

    def rounds(self, requests: int, length: int, masters: int) -> Floats:
        """[batches, rounds] seconds of batches of a size."""
        return np.array([
            one.round_s for one in self.timings
            if one.job.rounds
            and (one.job.requests, one.length, one.job.masters) == (requests, length, masters)
        ])  # fmt: skip


def time_once(seed: int) -> Repeat:
    """Every job in every pass, in an order drawn anew for each."""
    jobs = _jobs(np.random.default_rng(seed))
    prompts = [length for job, length in jobs for _ in range(job.requests)]
    answers = [1 + job.rounds for job, _ in jobs for _ in range(job.requests)]
    served = serve_elastic(
        run_of(
            OneAfterAnother([job for job, _ in jobs]),
            Recorded(
                arrival_s=[0.0] * len(prompts), prompt_tokens=prompts, output_tokens=answers
            ),
            _any_base(), seed,
        )
    )  # fmt: skip
    work = [one for one in served.work if one.kind == "prefill"]
    return repeat_of(list(_timings(served.tables, jobs)), work)


def repeat_of(timings: list[Timing], work: list[Work]) -> Repeat:
    """One run with what its calibrated jobs say of the others."""
    base = fitted_base(timings)
    alone = [_base([one], base.decode) for one in fitted_prefills(timings, bounded=False)]
    return Repeat(timings, work, base, alone)


def _jobs(stream: np.random.Generator) -> list[tuple[Job, int]]:
    """Of all passes, each with the tokens of its prompts."""
    found: list[tuple[Job, int]] = []
    lengths = [*CALIBRATED, *JUDGED]
    for _ in range(PASSES):
        one = [(Job(1, degree, spread=False), length) for length in lengths for degree in DEGREES]
        one += [
            (Job(count, 1, spread=False, masters=masters, rounds=ROUNDS), length)
            for count, length in (*CALIBRATED_BATCHES, JUDGED_BATCH) for masters in DEGREES
            if count >= masters
        ]  # fmt: skip
        order = stream.permutation(len(one) + PAIRS_A_PASS).tolist()
        for at in order:
            if at < len(one):
                found.append(one[at])
                continue
            pair = [(Job(1, 2, spread=spread), PAIRED) for spread in (False, True)]
            found += pair if stream.random() < 0.5 else pair[::-1]
    return found


def _timings(tables: ElasticTables, jobs: Iterable[tuple[Job, int]]) -> Iterable[Timing]:
    """Jobs with the groups that computed them: one prefill, then rounds."""
    groups = _groups(tables)
    at = 0
    for job, length in jobs:
        begin_s, end_s = groups[at][1:]
        rounds = groups[at + 1 : at + 1 + job.rounds]
        assert [groups[at][0], *(kind for kind, *_ in rounds)] == [PREFILL] + [DECODE] * len(rounds)
        yield Timing(job, length, end_s - begin_s, [end - begin for _, begin, end in rounds])
        at += 1 + len(rounds)


def _groups(tables: ElasticTables) -> list[tuple[int, float, float]]:
    """Kind, start and end of each group in order."""
    columns = (tables.members[name].tolist() for name in ("step", "group", "kind", "start_s",
                                                          "end_s"))  # fmt: skip
    found: dict[tuple[int, int, int], tuple[int, float, float]] = {}
    for step, group, kind, start_s, end_s in zip(*columns, strict=True):
        found.setdefault((step, group, kind), (kind, start_s, end_s))
    return list(found.values())


def fitted_prefills(timings: Sequence[Timing], *, bounded: bool) -> list[PrefillScaling]:
    """What the calibrated lengths say of the others, by degree; medians over passes.

    Args:
        timings: of all jobs.
        bounded: whether no coefficient may exceed that of one instance fewer.
    """
    found: list[PrefillScaling] = []
    for degree in DEGREES:
        seconds = [float(np.median(prefills(timings, degree, length))) for length in CALIBRATED]
        found.append(fitted_prefill(CALIBRATED, seconds, found[-1] if found and bounded else None))
    return found


def prefills(
    timings: Iterable[Timing], degree: int, length: int, *, spread: bool = False
) -> Floats:
    """Seconds of all prefills of one request with these sizes."""
    return np.array([
        one.prefill_s for one in timings
        if not one.job.rounds
        and (one.job.degree, one.length, one.job.spread) == (degree, length, spread)
    ])  # fmt: skip


def fitted_base(timings: Sequence[Timing]) -> ScalingBase:
    """What the calibrated lengths and batches say, as plans know it."""
    rounds = [
        (work_of(one, number), seconds) for one in timings
        if (one.job.requests, one.length) in CALIBRATED_BATCHES
        for number, seconds in enumerate(one.round_s)
    ]  # fmt: skip
    return _base(fitted_prefills(timings, bounded=True), fitted_decode(*zip(*rounds, strict=True)))


def work_of(timing: Timing, rounds: int) -> DecodeWork:
    """Of a round after so many others: the first instance has all of the prompts."""
    job = timing.job
    mini = tuple(count for _, count in dealt(job.requests, range(job.masters)))
    held = [job.requests * timing.length if at == 0 else 0 for at in range(job.masters)]
    tokens = tuple(have + rounds * count for have, count in zip(held, mini, strict=True))
    return DecodeWork(mini, tokens, mini)


def _base(prefill: list[PrefillScaling], decode: DecodeScaling) -> ScalingBase:
    return ScalingBase(
        name="fitted", model="random", device="this machine", prefill=prefill, decode=decode,
        source="fitted to interleaved runs of two ranks",
    )  # fmt: skip


def _any_base() -> ScalingBase:
    """For a plan that asks for none of it."""
    return tiny_scaling(max(DEGREES))


def run_of(plan: ElasticPlan, load: Recorded, base: ScalingBase, seed: int) -> ElasticRun:
    """A run of the model that is timed, on as many instances as there are degrees."""
    return ElasticRun(
        config=CONFIG, num_instances=max(DEGREES), plan=plan, limits=LIMITS, scaling=base,
        workload=load, seed=seed,
    )  # fmt: skip


# The lines -----------------------------------------------------------------------------------


def time_lines(repeats: Sequence[Repeat], accept: dict[str, float], seed: int) -> list[Line]:
    """Prefills, their ratios, rounds, and what keeping KV costs."""
    lines: list[Line] = []
    for length in JUDGED:
        for degree in DEGREES:
            rows = [_prefill_ratios(one, degree, length) for one in repeats]
            text = _milliseconds(repeats, degree, length)
            metric = f"prefill of {length} tokens, d = {degree}"
            lines.append(_line(metric, text, rows, accept.get("prefill_error"), seed))
    for length in JUDGED:
        ratios = [_gain_ratios(one, length) for one in repeats]
        metric = f"prefill of {length} tokens, d = 2 over d = 1"
        text = _gains(repeats, length)
        lines.append(_line(metric, text, ratios, accept.get("prefill_ratio_error"), seed))
    for masters in DEGREES:
        rows = [_round_ratios(one, masters) for one in repeats]
        metric = f"round of {JUDGED_BATCH[0]} requests, {masters} master{'s'[: masters - 1]}"
        text = _round_text(repeats, masters)
        lines.append(_line(metric, text, rows, accept.get("round_error"), seed))
    return [*lines, share_line(repeats, accept, seed), pair_line(repeats, accept, seed)]


def _predicted_s(repeat: Repeat, degree: int, length: int) -> float:
    return Scaled(repeat.alone[degree - 1]).prefill_s(1, [length])


def _prefill_ratios(repeat: Repeat, degree: int, length: int) -> Floats:
    return _predicted_s(repeat, degree, length) / repeat.prefills(degree, length)


def _gain_ratios(repeat: Repeat, length: int) -> Floats:
    """Predicted over measured, of T(2) / T(1) of every pass."""
    measured = repeat.prefills(2, length) / repeat.prefills(1, length)
    return _predicted_s(repeat, 2, length) / _predicted_s(repeat, 1, length) / measured


def _round_predicted_s(repeat: Repeat, masters: int) -> Floats:
    """Of the rounds of the judged batch, one after another."""
    requests, length = JUDGED_BATCH
    timing = Timing(Job(requests, 1, spread=False, masters=masters), length, 0.0, [])
    return Scaled(repeat.base).round_run_s([work_of(timing, 0)], ROUNDS)


def _round_ratios(repeat: Repeat, masters: int) -> Floats:
    """Of whole runs of rounds, one a pass."""
    measured = repeat.rounds(*JUDGED_BATCH, masters).sum(1)
    return _round_predicted_s(repeat, masters).sum() / measured


def _line(
    metric: str, text: tuple[str, str], ratios: Sequence[Floats], accepted: float | None, seed: int
) -> Line:
    def error(drawn: Floats) -> float:
        return abs(float(np.median(drawn)) - 1)

    value, low, high = _with_interval(ratios, error, seed)
    return Line(
        question="time", metric=metric, simulated=text[0], measured=text[1], error=value, low=low,
        high=high, accepted=accepted, verdict=judge_error(value, low, high, accepted),
    )  # fmt: skip


def _with_interval(
    rows: Sequence[Floats], statistic: Callable[[Floats], float], seed: int
) -> tuple[float, float, float]:
    """A statistic of all values, with its 95 % interval. Values lie along the last axis."""
    values = [[one[..., at : at + 1] for at in range(one.shape[-1])] for one in rows]
    return statistic(np.concatenate(rows, axis=-1)), *two_stage(values, statistic, seed)


def _milliseconds(repeats: Sequence[Repeat], degree: int, length: int) -> tuple[str, str]:
    ours = np.median([_predicted_s(one, degree, length) for one in repeats])
    theirs = np.median(np.concatenate([one.prefills(degree, length) for one in repeats]))
    return f"{ours * 1e3:.1f} ms", f"{theirs * 1e3:.1f} ms"


def _gains(repeats: Sequence[Repeat], length: int) -> tuple[str, str]:
    ours = np.median(
        [_predicted_s(one, 2, length) / _predicted_s(one, 1, length) for one in repeats]
    )
    theirs = np.median(
        np.concatenate([one.prefills(2, length) / one.prefills(1, length) for one in repeats])
    )
    return f"{ours:.3f}", f"{theirs:.3f}"


def _round_text(repeats: Sequence[Repeat], masters: int) -> tuple[str, str]:
    ours = np.median([_round_predicted_s(one, masters).mean() for one in repeats])
    theirs = np.median(
        np.concatenate([one.rounds(*JUDGED_BATCH, masters).mean(1) for one in repeats])
    )
    return f"{ours * 1e3:.2f} ms", f"{theirs * 1e3:.2f} ms"


def share_line(repeats: Sequence[Repeat], accept: dict[str, float], seed: int) -> Line:
    """The spans of the copies that keep KV, as a share of the prefills that they are part of."""
    spans = [
        np.array([(one.keep_s, one.end_s - one.begin_s) for one in repeat.work]).T
        for repeat in repeats
    ]

    def share(drawn: Floats) -> float:
        return float(drawn[0].sum() / drawn[1].sum())

    value, low, high = _with_interval(spans, share, seed)
    accepted = accept.get("keep_share")
    return Line(
        question="time", metric="copies that keep KV: share of the prefill", simulated="",
        measured=f"{sum(one[0].sum() for one in spans) * 1e3:.1f} ms", error=value, low=low,
        high=high, accepted=accepted, verdict=judge_error(value, low, high, accepted),
    )  # fmt: skip


def pair_line(repeats: Sequence[Repeat], accept: dict[str, float], seed: int) -> Line:
    """What scale-down adds to a prefill, by pairs that were timed next to each other."""
    rows = [
        np.stack([one.prefills(2, PAIRED), one.prefills(2, PAIRED, spread=True)])
        for one in repeats
    ]  # fmt: skip

    def slower(drawn: Floats) -> float:
        return float(np.median(drawn[0] / drawn[1]) - 1)

    value, low, high = _with_interval(rows, slower, seed)
    accepted = accept.get("keep_error")
    return Line(
        question="time", metric=f"prefill of {PAIRED} tokens: with scale-down over without",
        simulated="", measured=f"{value:+.1%} of {sum(one.shape[1] for one in rows)} pairs",
        error=value, low=low, high=high, accepted=accepted,
        verdict=judge_bound(low, high, accepted),
        note="the upper end of the interval must be accepted",
    )  # fmt: skip


def judge_bound(low: float, high: float, accepted: float | None) -> Verdict:
    """Judge a figure that may be anything below a bound: its whole interval must be."""
    if accepted is None:
        return Verdict.reported
    if high <= accepted:
        return Verdict.passed
    return Verdict.missed if low > accepted else Verdict.too_noisy
