"""Question 4 for attention and expert ranks: is the gain of micro-batches as predicted?

One attention rank and one expert rank decode a fixed number of requests a micro-batch, over the
link that there is and over emulated ones on which a transfer takes a given share of T_f. Stage
times come from iterations of one micro-batch of other sizes, in which nothing overlaps; what
several micro-batches make of them is the event simulation's answer.
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from rich.progress import Progress

from backends.emulated_link import EmulatedLink
from backends.expert_timing import TIMED_CONFIG, Busy, Phase, Timed, time_phases, time_together
from scenarios.validation.intervals import Floats, two_stage
from scenarios.validation.verdict import Line, Verdict, judge_error
from sim.expert_rows import Span
from sim.processes.stations import StageTimes, iteration_s
from sim.state.ping_pong import StageSeconds

TOKENS, CONTEXT = 32, 256
"""Of a micro-batch that is judged."""
CALIBRATED = (20, 28, 36, 44)
"""Sizes of micro-batches whose stages are timed; that of `TOKENS` is not among them."""
COUNTS = (1, 2, 3, 4)
SHARES = (0.10, 0.28, 0.38)
"""T_c / T_f of the emulated links: those of figure 14."""
CALIBRATED_SHARE = 0.20
"""Of the emulated link that the calibration knows."""
ITERATIONS, TOGETHER_ROUNDS = 14, 5
ACCEPT_KEYS = ("speed_up_error", "iteration_error")
"""What a study may name under `accept`."""
LAYERS = int(str(TIMED_CONFIG["num_hidden_layers"]))
NATIVE = "native"


DRAWS = 30
"""Iterations that are simulated for one prediction, each with times drawn anew; their median."""
ONE: Floats = np.ones(1)


class Stages(NamedTuple):
    """What the calibration found for a micro-batch of `TOKENS`."""

    attention_s: float
    expert_s: float
    outside_s: float
    native_s: float
    """One way over the link that there is."""
    late_s: float
    """What a transfer over an emulated link takes beside what it should. Its time begins when the
    rows are handed in, shortly before attention or experts are done: it may be negative."""
    busy: Busy
    """How much two busy ranks slow each other down."""
    attention_ratios: Floats = ONE
    """By how much attention of a layer differs from its mean, equally likely."""
    expert_ratios: Floats = ONE
    """The same of experts."""

    @property
    def compute_s(self) -> float:
        """T_f."""
        return max(self.attention_s, self.expert_s)

    def transfer_s(self, share: float | None) -> float:
        """One way over an emulated link, or the native one."""
        return self.native_s if share is None else self.compute_s * share + self.late_s


class Repeat(NamedTuple):
    """One pass over everything."""

    stages: Stages
    measured: dict[tuple[str, int], Timed]
    """By link and number of micro-batches."""
    nominal: dict[str, float]
    """Seconds that each emulated link takes for a micro-batch."""


class PipelineRuns(NamedTuple):
    """What the picture shows: one iteration on both panels."""

    simulated: list[Span]
    measured: list[Span]
    title: str


def timed(
    repeats: int, accept: dict[str, float], seed: int, progress: Progress
) -> tuple[PipelineRuns, list[Line]]:
    """Time everything so many times, and judge it."""
    task = progress.add_task("time", total=repeats + 1)
    first = calibrate(time_phases(calibration_phases(None)), None, _busy())
    progress.advance(task)
    found: list[Repeat] = []
    for _ in range(repeats):
        found.append(_pass(first))
        progress.advance(task)
    return _picture(found[-1]), [_machine_line(found), *time_lines(found, accept, seed)]


def calibration_phases(stages: Stages | None) -> list[Phase]:
    """Iterations of one micro-batch: of several sizes, then over an emulated link."""
    phases = [Phase(1, tokens, CONTEXT, None, ITERATIONS) for tokens in CALIBRATED]
    if stages is not None:
        link = link_of(stages.compute_s * CALIBRATED_SHARE, CALIBRATED[0])
        phases.append(Phase(1, CALIBRATED[0], CONTEXT, link, ITERATIONS))
    return phases


def calibrate(timings: Sequence[Timed], known: Stages | None, busy: Busy) -> Stages:
    """Stage times of a micro-batch of `TOKENS`, from those of others.

    Args:
        timings: of `calibration_phases(known)`.
        known: an earlier calibration, by which the emulated link was chosen.
        busy: how much two busy ranks slow each other down.
    """
    plain = timings[: len(CALIBRATED)]

    def at_tokens(of: Callable[[Timed], float]) -> float:
        slope, start = np.polyfit(CALIBRATED, [of(one) for one in plain], 1)
        return float(start + slope * TOKENS)

    late_s = 0.0
    if known is not None:
        late_s = way_s(timings[-1]) - known.compute_s * CALIBRATED_SHARE
    return Stages(
        at_tokens(lambda one: float(np.mean(one.attention_s))),
        at_tokens(lambda one: float(np.mean(one.expert_s))),
        at_tokens(lambda one: float(np.mean(one.outside_s))),
        at_tokens(way_s), late_s, busy,
        _ratios([one.attention_s for one in plain]), _ratios([one.expert_s for one in plain]),
    )  # fmt: skip


def _ratios(samples: Sequence[Sequence[float]]) -> Floats:
    return np.concatenate([np.array(one) / np.mean(one) for one in samples])


def _busy() -> Busy:
    return time_together(CALIBRATED[1], CONTEXT, TOGETHER_ROUNDS)


def way_s(timed: Timed) -> float:
    """One way, from an iteration of one micro-batch: what attention and experts leave of it."""
    working_s = LAYERS * (np.mean(timed.attention_s) + np.mean(timed.expert_s))
    rest_s = float(np.mean(timed.seconds) - working_s - np.mean(timed.outside_s))
    return max(rest_s, 0.0) / (2 * LAYERS)


def link_of(seconds: float, tokens: int) -> EmulatedLink:
    """A link that takes so long for the rows of a micro-batch, all of it by bandwidth."""
    rows = tokens * int(str(TIMED_CONFIG["num_experts_per_tok"]))
    num_bytes = rows * int(str(TIMED_CONFIG["hidden_size"])) * 4
    return EmulatedLink(latency_s=0.0, bandwidth_bytes_per_s=num_bytes / seconds)


def _pass(first: Stages) -> Repeat:
    """The calibration and all that is judged, in one run of the two ranks."""
    nominal = {f"{share:.2f}": share * first.compute_s for share in SHARES}
    links: dict[str, EmulatedLink | None] = {NATIVE: None}
    links |= {name: link_of(seconds, TOKENS) for name, seconds in nominal.items()}
    judged = list(product(links, COUNTS))
    before = calibration_phases(first)
    phases = [Phase(m, TOKENS, CONTEXT, links[name], ITERATIONS) for name, m in judged]
    timings = time_phases([*before, *phases])
    stages = calibrate(timings[: len(before)], first, _busy())
    return Repeat(stages, dict(zip(judged, timings[len(before) :], strict=True)), nominal)


def predicted_s(repeat: Repeat, name: str, count: int) -> float:
    """Seconds of an iteration: the median of several simulated ones."""
    draws = range(DRAWS if len(repeat.stages.attention_ratios) > 1 else 1)
    return float(np.median([iteration_s(predicted_times(repeat, name, count, at)) for at in draws]))


def predicted_times(repeat: Repeat, name: str, count: int, draw: int = 0) -> StageTimes:
    """Of every station, in which no layer takes quite what another does.

    Where each side waits for the other, the slower of both counts in every turn: what varies adds
    up, although its mean does not change.
    """
    stages = repeat.stages
    transfer_s = stages.native_s
    if name != NATIVE:
        transfer_s = repeat.nominal[name] + stages.late_s
    alone = StageSeconds(stages.attention_s, stages.expert_s, transfer_s)
    sizes = (LAYERS, count)
    times = StageTimes.alike(*side_by_side(alone, stages.busy, count), sizes, stages.outside_s)
    stream = np.random.default_rng((draw, count))
    return times._replace(
        attention_s=times.attention_s * stream.choice(stages.attention_ratios, sizes),
        expert_s=times.expert_s * stream.choice(stages.expert_ratios, sizes),
    )


def side_by_side(stages: StageSeconds, busy: Busy, count: int) -> StageSeconds:
    """What stages take while the other kind of rank computes too, as much of the time as it does.

    With one micro-batch never both compute.
    """
    if count == 1:
        return stages
    attention_s, expert_s, transfer_s = stages
    for _ in range(8):  # each depends on the other; it settles at once
        now = StageSeconds(attention_s, expert_s, transfer_s)
        turn_s = max(now.compute_s, now.round_trip_s / count)
        attention_s = stages.attention_s * (1 + (busy.attention - 1) * expert_s / turn_s)
        expert_s = stages.expert_s * (1 + (busy.experts - 1) * now.attention_s / turn_s)
    return StageSeconds(attention_s, expert_s, transfer_s)


def time_lines(repeats: Sequence[Repeat], accept: dict[str, float], seed: int) -> list[Line]:
    """Speed-up over one micro-batch, and the iteration itself, for every link."""
    lines: list[Line] = []
    for name in (NATIVE, *(f"{share:.2f}" for share in SHARES)):
        label = "native link" if name == NATIVE else f"emulated link, T_c/T_f {name}"
        for count in COUNTS:
            ratios = [_iteration_ratios(one, name, count) for one in repeats]
            text = _milliseconds(repeats, name, count)
            what = f"{label}: iteration, m = {count}"
            if count == 1:  # what the calibration says of other sizes, laid through this one
                what += " (consistency check)"
            lines.append(_line(what, text, ratios, accept.get("iteration_error"), seed))
        for count in COUNTS[1:]:
            ratios = [_speed_up_ratios(one, name, count) for one in repeats]
            what = f"{label}: speed-up of m = {count} over 1"
            text = _speed_ups(repeats, name, count)
            lines.append(_line(what, text, ratios, accept.get("speed_up_error"), seed))
    return lines


def _iteration_ratios(repeat: Repeat, name: str, count: int) -> Floats:
    """Predicted over measured, of every iteration."""
    return predicted_s(repeat, name, count) / np.array(repeat.measured[name, count].seconds)


def _speed_up_ratios(repeat: Repeat, name: str, count: int) -> Floats:
    """The same of m T(1) / T(m)."""
    one, many = (np.array(repeat.measured[name, m].seconds) for m in (1, count))
    measured = one / many  # both times as often, as iterations do m times the work
    predicted = predicted_s(repeat, name, 1) / predicted_s(repeat, name, count)
    return predicted / measured


def _line(
    metric: str, text: tuple[str, str], ratios: Sequence[Floats], accepted: float | None, seed: int
) -> Line:
    def error(drawn: Floats) -> float:
        return abs(float(np.median(drawn)) - 1)

    rows = [[np.array([one]) for one in repeat] for repeat in ratios]
    value = error(np.concatenate(ratios))
    low, high = two_stage(rows, error, seed)
    return Line(
        question="time", metric=metric, simulated=text[0], measured=text[1], error=value, low=low,
        high=high, accepted=accepted, verdict=judge_error(value, low, high, accepted),
    )  # fmt: skip


def _milliseconds(repeats: Sequence[Repeat], name: str, count: int) -> tuple[str, str]:
    ours = np.median([predicted_s(one, name, count) for one in repeats])
    theirs = np.median(np.concatenate([one.measured[name, count].seconds for one in repeats]))
    return f"{ours * 1e3:.2f} ms", f"{theirs * 1e3:.2f} ms"


def _speed_ups(repeats: Sequence[Repeat], name: str, count: int) -> tuple[str, str]:
    ours = np.median(
        [count * predicted_s(one, name, 1) / predicted_s(one, name, count) for one in repeats]
    )
    theirs = np.median(
        np.concatenate(
            [count * np.array(one.measured[name, 1].seconds)
             / np.array(one.measured[name, count].seconds) for one in repeats]
        )
    )  # fmt: skip
    return f"{ours:.3f}", f"{theirs:.3f}"


def _machine_line(repeats: Sequence[Repeat]) -> Line:
    """What the calibration found; two busy ranks may slow each other down."""
    stages = [one.stages for one in repeats]
    busy = np.median([one.busy for one in stages], axis=0)
    parts = np.median(np.array([one[:5] for one in stages]), axis=0) * 1e3
    note = (
        f"a layer takes {parts[0]:.2f} ms on attention and {parts[1]:.2f} ms on experts, a native "
        f"transfer {parts[3]:.2f} ms, lm_head {parts[2]:.2f} ms; one over an emulated link takes "
        f"{parts[4]:+.2f} ms beside what it should"
    )
    return Line(
        question="time", metric="two busy ranks slow each other down", simulated="",
        measured=f"{busy[0]:.3f} and {busy[1]:.3f} times", error=None, verdict=Verdict.reported,
        note=note,
    )  # fmt: skip


def _picture(repeat: Repeat) -> PipelineRuns:
    """One iteration of three micro-batches over the slowest emulated link, on both panels."""
    from scenarios.pipeline_plot import visited  # draws: only whoever has timed waits for it

    name, count = f"{SHARES[-1]:.2f}", 3
    simulated = visited(predicted_times(repeat, name, count))
    title = f"{count} micro-batches, T_c/T_f = {name} (emulated link)"
    return PipelineRuns(simulated, repeat.measured[name, count].spans, title)
