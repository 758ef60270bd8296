"""Questions 1 and 2 for a replica on several ranks, with what the ranks send each other."""

from collections import Counter

from backends.parallel_serving import ParallelRun, ParallelServed, serve_parallel
from scenarios.validation.decisions import (
    CONTEXT,
    FLOAT32_BYTES,
    Panels,
    byte_lines,
    decision_line,
    replay,
    stopped_lines,
)
from scenarios.validation.verdict import Line, Verdict, judge_exact
from sim.models.architecture import Architecture
from sim.models.communication import iteration_collectives
from sim.models.work import IterationShape
from sim.trace import Trace

CONTROL = ("orders", "done")
"""What the engine sends to run its ranks: no model predicts it, so it is shown and not judged."""


def parallel_lines(name: str, run: ParallelRun, config: Architecture) -> list[Line]:
    """Questions 1 and 2 for one policy."""
    try:
        found = serve_parallel(run)
        simulated = replay(found.served.trace, run.batching, run.limits, CONTEXT)
    except ValueError as error:
        return stopped_lines(name, error)
    panels = Panels(found.served, simulated)
    return [
        decision_line(name, panels),
        *byte_lines(name, panels, config),
        *sent_lines(name, found, simulated, config, run),
        control_line(name, found),
    ]


def simulated_bytes(trace: Trace, config: Architecture, tp_size: int, pp_size: int) -> Counter[str]:
    """What the decisions of a simulated trace make the ranks send, by what is carried."""
    total: Counter[str] = Counter()
    columns = [trace.decisions[name].tolist() for name in IterationShape._fields]
    for repeat, *row in zip(trace.decisions["repeat"].tolist(), *columns, strict=True):
        # Within a stretch of decodes only contexts grow, and they are not sent.
        shape = IterationShape(*row)
        for one in iteration_collectives(config, shape, tp_size, pp_size, FLOAT32_BYTES):
            total[one.name] += repeat * one.total_bytes
    return total


def sent_lines(
    name: str, found: ParallelServed, simulated: Trace, config: Architecture, run: ParallelRun
) -> list[Line]:
    """Question 2 for what the ranks send: everything but the engine's own orders."""
    ours = simulated_bytes(simulated, config, run.tp_size, run.pp_size)
    theirs = found.payload_bytes()
    carried = [what for what in dict.fromkeys((*ours, *theirs)) if what not in CONTROL]
    return [
        Line(
            question="bytes", metric=f"{name}: {what.replace('_', ' ')} sent",
            simulated=f"{ours[what]:,}", measured=f"{theirs[what]:,}",
            error=abs(ours[what] - theirs[what]), accepted=0,
            verdict=judge_exact(abs(ours[what] - theirs[what])),
        )
        for what in carried
    ]  # fmt: skip


def control_line(name: str, found: ParallelServed) -> Line:
    """How much the engine sent to run its ranks."""
    sent = found.payload_bytes()
    return Line(
        question="bytes", metric=f"{name}: orders sent", simulated="",
        measured=f"{sum(sent[what] for what in CONTROL):,}", error=None, verdict=Verdict.reported,
        note="what the first rank tells the others is the engine's own, and no model predicts it",
    )  # fmt: skip
