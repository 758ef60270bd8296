"""Question 4 for instances that prefill and instances that decode: is their time as predicted?

Every instance times its own iterations between the runs, all of them at once, so that each is as
fast as beside the others; and those that decode time the fetching of KV.
"""

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rich.progress import Progress

from backends.hand_over import Instances, InstanceSpec
from backends.instance_timing import MovePlan, Timed
from scenarios import calibrate
from scenarios.validation import timing
from scenarios.validation.timing import Runs
from scenarios.validation.verdict import Line, Verdict
from sim.costs.collective_fitting import AlphaBeta, fit_alpha_beta
from sim.costs.fitted import Fitted
from sim.metrics import hand_over_s
from sim.policies.batching.base import Batching
from sim.processes.hand_over import simulate_hand_over
from sim.processes.kv_moves import LinkTransport
from sim.processes.pace import Costed
from sim.processes.router import Engines
from sim.trace import Trace
from sim.trace_merge import of_replica
from sim.workload.recorded import Recorded
from sim.workload.source import Source

if TYPE_CHECKING:
    from scenarios.validation.ask import Plan

MOVED_BLOCKS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Blocks of the fetches that are timed."""
MOVE_ROUNDS = 5
SATURATED = 64
"""Requests that are there from the start when the capacity is asked for."""


class Costs(NamedTuple):
    """What was measured in the processes of the instances."""

    iterations: list[Fitted]
    """One an instance."""
    move: AlphaBeta
    token_bytes: int


def timed_runs(plan: "Plan", progress: Progress) -> tuple[dict[str, Runs], list[Line]]:
    """Time every policy; the passes of the calibration lie between the runs."""
    sizes, options, names = plan.options.sizes, plan.options, list(plan.policies)
    task = progress.add_task("time", total=1 + sizes.repeats * len(names))
    spec = InstanceSpec(
        weights=options.weights, device=options.device.value, limits=timing.LIMITS,
        batching=plan.policies[names[0]], seed=options.seed, plan=plan.instance_plan,
        num_instances=plan.num_replicas,
    )  # fmt: skip
    measured: dict[str, list[Trace]] = {name: [] for name in names}
    spent: list[Costs] = []
    with Instances(spec) as instances:
        instances.ask("prepare", calibrate.planned_batches())
        instances.ask("time", (0, 1))
        progress.advance(task)
        capacity = min(_capacity_per_s(plan, one, _costs(instances, 0)) for one in _rules(plan))
        requests = timing.workload(options.load * capacity, sizes.time_requests)
        for repeat in range(sizes.repeats):
            first = repeat % len(names)
            for part, name in enumerate((*names[first:], *names[:first])):
                source = Source(requests, options.seed, timing.CONTEXT)
                served = instances.serve(source, plan.routing, plan.policies[name])
                measured[name].append(served.trace)
                instances.ask("time", (part, len(names)))
                progress.advance(task)
            spent.append(_costs(instances, repeat))
        found: list[Timed] = instances.ask("timed", 0)
    source = partial(Source, requests, options.seed, timing.CONTEXT)
    runs = {
        name: Runs([_predict(source(), plan, plan.policies[name], one) for one in spent],
                   traces, [], [])
        for name, traces in measured.items()
    }  # fmt: skip
    spread = float(np.mean([one.spread for one in found]))
    return runs, _lines(plan, runs, spent, spread)


def _rules(plan: "Plan") -> list[Batching]:
    return list(plan.policies.values())


def _costs(instances: Instances, first_pass: int) -> Costs:
    """Fits of what was timed since a pass, and of fetches that are timed now."""
    timed: list[Timed] = instances.ask("timed", first_pass)
    moves: dict[int, list[float]] = {}
    for _ in range(MOVE_ROUNDS):
        for source in instances.first:
            for target in instances.second:
                plan = MovePlan(source, list(MOVED_BLOCKS))
                instances.tell(source, "hold", plan)
                for num_bytes, seconds in instances.tell(target, "fetch", plan):
                    moves.setdefault(num_bytes, []).append(seconds)
                instances.tell(source, "held", None)
    medians = [float(np.median(seconds)) for seconds in moves.values()]
    fits = [Fitted(calibrate.fit_of(one.measured)) for one in timed]
    token_bytes = min(moves) // (MOVED_BLOCKS[0] * timing.LIMITS.block_size)
    return Costs(fits, fit_alpha_beta(list(moves), medians), token_bytes)


def _predict(source: Source, plan: "Plan", batching: Batching, costs: Costs) -> Trace:
    """The simulated panel of a timed run."""
    paces = [Costed(cost) for cost in costs.iterations]
    engines = Engines(batching=batching, limits=timing.LIMITS, paces=paces)
    link = partial(LinkTransport, latency_s=costs.move.latency_s,
                   bytes_per_s=costs.move.bandwidth_bytes_per_s)  # fmt: skip
    return simulate_hand_over(
        source, plan.routing, plan.instance_plan, engines, link, costs.token_bytes
    )


def _capacity_per_s(plan: "Plan", batching: Batching, costs: Costs) -> float:
    """Requests a second that are served when all are there from the start."""
    saturated = Recorded(
        arrival_s=[0.0] * SATURATED, prompt_tokens=[timing.PROMPT_TOKENS] * SATURATED,
        output_tokens=[timing.OUTPUT_TOKENS] * SATURATED,
    )  # fmt: skip
    trace = _predict(Source(saturated, 0, timing.CONTEXT), plan, batching, costs)
    return SATURATED / float(trace.iterations["end_s"].max())


def _lines(plan: "Plan", runs: dict[str, Runs], spent: list[Costs], spread: float) -> list[Line]:
    """Every line of question 4."""
    lines = [timing.machine_line(spread)]
    for name, one in runs.items():
        for figure in timing.FIGURES:
            lines += timing.request_lines(name, figure, one, plan.accept, plan.options.seed)
    for name, one in runs.items():
        for number in range(plan.num_replicas):
            side = Runs(
                one.simulated, [of_replica(trace, number) for trace in one.measured],
                [costs.iterations[number] for costs in spent], [],
            )  # fmt: skip
            label = f"{name}, instance {number}"
            lines += timing.iteration_lines(label, side, plan.options.seed)
        lines.append(_hand_over_line(name, one))
    return lines


def _hand_over_line(name: str, runs: Runs) -> Line:
    """From the first token to the decision at which the request decodes elsewhere, the median."""
    ours, theirs = (
        float(np.median(np.concatenate([hand_over_s(trace) for trace in traces])))
        for traces in (runs.simulated, runs.measured)
    )
    return Line(
        question="time", metric=f"{name}: from first token to decoding elsewhere, median",
        simulated=f"{ours * 1e3:.1f} ms", measured=f"{theirs * 1e3:.1f} ms",
        error=abs(ours / theirs - 1), verdict=Verdict.reported,
    )  # fmt: skip
