"""Question 4 for a knowledge cache: is the TTFT as predicted, and what keeping documents gains?

Questions about a generated corpus, as Poisson arrivals at a share of the capacity without reuse.
The simulated panel knows the calibrated iterations and copies and nothing of the runs. The stages
of a search take a given time on both panels: faiss answers within it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rich.progress import Progress

from backends.copy_timing import copy_seconds
from backends.knowledge_cache import serve_knowledge
from backends.serving import open_model
from backends.transformer import Transformer
from scenarios.validation import knowledge_cases as cases
from scenarios.validation import reproduced, timing
from scenarios.validation.calibrated import CalibratedCosts
from scenarios.validation.intervals import Floats, two_stage
from scenarios.validation.knowledge_cases import Case
from scenarios.validation.timing import Runs
from scenarios.validation.verdict import Line, Verdict, judge_error
from sim.costs.collective_fitting import AlphaBeta, fit_alpha_beta
from sim.costs.fitted import Fitted
from sim.knowledge_metrics import knowledge_figures
from sim.knowledge_rules import Rules
from sim.knowledge_setup import estimator_of
from sim.metrics import request_times
from sim.policies.cache_eviction.base import CacheEviction
from sim.processes.knowledge_cache import Search, simulate_knowledge
from sim.processes.pace import Costed
from sim.trace import Trace

if TYPE_CHECKING:
    from scenarios.validation.ask import Plan

REQUESTS_PER_TIMED = 3
"""Answers are short here, so that so many times the usual number is asked for."""
TIMED = ("lru", "pgdsf")
"""Rules that are timed where they are among those asked about; else all that are."""
UNCACHED = "no reuse"
STAGE_SHARE = 0.05
"""Of the time that a request without reuse takes of the engine: what each stage of a search takes,
on both panels. An emulated duration."""
SATURATED_PER_S = 1e6
COPIED_BLOCKS = (1, 2, 4, 6, 8, 12, 16)
COPY_ROUNDS = 5
ACCEPT_KEYS = ("ttft_mean_error", "ttft_ratio_error")
"""What a study may name under `accept`."""


class Variant(NamedTuple):
    """One way to keep documents."""

    rules: Rules
    reuse: bool


class Costs(NamedTuple):
    """What was measured beside the runs of one repeat."""

    iteration: Fitted
    copy: AlphaBeta
    block_bytes: int

    def copy_s(self, blocks: int) -> float:
        """Seconds to copy the blocks of one document."""
        return self.copy.seconds(blocks * self.block_bytes)


def variants_of(rules: Rules, evictions: Mapping[str, CacheEviction]) -> dict[str, Variant]:
    """What is timed, by name; the last one is the rule that others are compared with."""
    chosen = {name: rule for name, rule in evictions.items() if name in TIMED} or evictions
    found = {UNCACHED: Variant(rules, reuse=False)}
    for name in sorted(chosen):  # pgdsf last
        found[name] = Variant(rules._replace(cache_eviction=chosen[name]), reuse=True)
    return found


def timed_runs(plan: "Plan", progress: Progress) -> tuple[dict[str, Runs], list[Line]]:
    """Time every variant; the passes of the calibration lie between the runs."""
    assert plan.knowledge is not None, "asked of studies that retrieve"
    options, sizes = plan.options, plan.options.sizes
    variants = variants_of(plan.knowledge.rules, plan.knowledge.evictions)
    names = list(variants)
    task = progress.add_task("time", total=1 + sizes.repeats * len(names))
    model, transformer = open_model(options.weights, options.device.value)
    costs = CalibratedCosts(options, transformer, model.name)
    progress.advance(task)
    count = sizes.time_requests * REQUESTS_PER_TIMED
    case = cases.timed(count, options.seed, estimator_of(costs.cost(), cases.CONTEXT).seconds)
    texts = case.texts(model.config.vocab_size, options.seed)
    measure = _copy_costs(case, transformer)
    spent = [Costs(costs.cost(), *measure())]
    capacity = capacity_per_s(case, variants[UNCACHED], spent[0])
    case, stage_s = case.paced(options.load * capacity), STAGE_SHARE / capacity
    measured: dict[str, list[Trace]] = {name: [] for name in names}
    for repeat in range(sizes.repeats):
        # Interleaved, and each variant in each place: what one leaves behind averages out.
        first = repeat % len(names)
        for part, name in enumerate((*names[first:], *names[:first])):
            rules, reuse = variants[name]
            real = serve_knowledge(
                transformer, case.questions, case.searcher(stage_s), texts, rules, case.limits,
                case.tiers._replace(reuse=reuse),
            )  # fmt: skip
            measured[name].append(real.trace)
            costs.refresh(part, len(names))
            progress.advance(task)
        spent.append(Costs(costs.cost(repeat), *measure()))
    costs.keep()
    runs = {
        name: Runs(
            [predict(case, variants[name], one, stage_s) for one in spent[1:]], traces, [], []
        )
        for name, traces in measured.items()
    }
    return runs, [timing.machine_line(costs.spread()), *time_lines(plan, runs, spent[-1])]


def predict(case: Case, variant: Variant, costs: Costs, stage_s: float = 0.0) -> Trace:
    """The simulated panel of a timed run; stages of its searches take so long."""
    tiers = case.tiers._replace(reuse=variant.reuse, copy_s=costs.copy_s)
    return simulate_knowledge(
        iter(case.questions), variant.rules, case.limits, Costed(costs.iteration), tiers,
        Search(0.0, stage_s, cores=1),
    )  # fmt: skip


def capacity_per_s(case: Case, variant: Variant, costs: Costs) -> float:
    """Requests a second that are answered when hardly any arrives after the start."""
    trace = predict(case.paced(SATURATED_PER_S), variant, costs)
    return len(case.questions) / float(trace.iterations["end_s"].max())


def time_lines(plan: "Plan", runs: Mapping[str, Runs], costs: Costs) -> list[Line]:
    """Every line of question 4 but that of the machine."""
    accept, seed = plan.accept, plan.options.seed
    *others, last = runs
    lines = [_copy_line(costs)]
    for name, one in runs.items():
        lines.append(_mean_line(name, one, accept.get("ttft_mean_error"), seed))
    for name in others:
        pair = (runs[name], runs[last])
        lines.append(_ratio_line(f"{name} / {last}", pair, accept.get("ttft_ratio_error"), seed))
    lines += [_hit_line(name, one) for name, one in runs.items() if name != UNCACHED]
    return lines


def _copy_costs(case: Case, transformer: Transformer) -> Callable[[], tuple[AlphaBeta, int]]:
    """Times copies between the tiers, both ways, whenever it is called."""
    cache = transformer.new_cache(2 * max(COPIED_BLOCKS), case.limits.block_size)

    def measure() -> tuple[AlphaBeta, int]:
        found = [copy_seconds(cache, blocks, COPY_ROUNDS) for blocks in COPIED_BLOCKS]
        sizes = [num_bytes for num_bytes, _ in found]
        fit = fit_alpha_beta(sizes, [seconds for _, seconds in found])
        return fit, sizes[0] // COPIED_BLOCKS[0]

    return measure


def _copy_line(costs: Costs) -> Line:
    rate = costs.copy.bandwidth_bytes_per_s / 1e9
    return Line(
        question="time", metric="a copy between the tiers", simulated="",
        measured=f"{costs.copy.latency_s * 1e3:.2f} ms + {rate:.1f} GB/s", error=None,
        verdict=Verdict.reported,
    )  # fmt: skip


Compared = Callable[[Floats], tuple[float, float]]
"""The simulated and the measured figure of TTFTs that were drawn, a row a side."""


def _mean_line(name: str, runs: Runs, accepted: float | None, seed: int) -> Line:
    """Mean TTFT over all requests of all repeats."""

    def means(drawn: Floats) -> tuple[float, float]:
        ours, theirs = drawn.mean(axis=1).tolist()
        return ours, theirs

    sides = (runs.simulated, runs.measured)
    return _judged(f"{name}: mean TTFT", "{:.3f} s", sides, means, accepted, seed)


def _ratio_line(name: str, pair: tuple[Runs, Runs], accepted: float | None, seed: int) -> Line:
    """Mean TTFT of one variant over that of another."""

    def ratios(drawn: Floats) -> tuple[float, float]:
        means = drawn.mean(axis=1).tolist()
        return means[0] / means[2], means[1] / means[3]

    above, below = pair
    sides = (above.simulated, above.measured, below.simulated, below.measured)
    return _judged(f"mean TTFT, {name}", "{:.3f}", sides, ratios, accepted, seed)


def _judged(
    metric: str, form: str, sides: Sequence[Sequence[Trace]], compared: Compared,
    accepted: float | None, seed: int,
) -> Line:  # fmt: skip
    """A figure of all requests of all repeats, with its interval, judged."""
    repeats = [
        [*np.stack([request_times(trace).ttft_s for trace in same], axis=1)[:, :, None]]
        for same in zip(*sides, strict=True)  # by generation, and so in order of request
    ]

    def error(drawn: Floats) -> float:
        ours, theirs = compared(drawn)
        return abs(ours / theirs - 1)

    each = [np.concatenate(rows, axis=1) for rows in repeats]
    pooled = np.concatenate(each, axis=1)
    ours, theirs = compared(pooled)
    low, high = two_stage(repeats, error, seed)
    again = reproduced.median_error([np.array(compared(rows)[1:]) for rows in each])
    return Line(
        question="time", metric=metric, simulated=form.format(ours), measured=form.format(theirs),
        error=error(pooled), low=low, high=high, accepted=accepted,
        verdict=judge_error(error(pooled), low, high, accepted, again),
        note="" if again is None else f"{metric}: a real run deviates from another by {again:.1%}",
    )  # fmt: skip


def _hit_line(name: str, runs: Runs) -> Line:
    """Documents found cached: timing decides who waits for whom, and so what is still there."""
    ours, theirs = (
        np.mean([knowledge_figures(trace, 1)["document_hit_share"] for trace in side])
        for side in (runs.simulated, runs.measured)
    )
    return Line(
        question="time", metric=f"{name}: documents found cached", simulated=f"{ours:.1%}",
        measured=f"{theirs:.1%}", error=None, verdict=Verdict.reported,
    )  # fmt: skip
