"""Questions 1 and 2 for a replica on several ranks, with what the ranks send each other."""

from collections import Counter

from backends.parallel_serving import (
    ParallelRun,
    ParallelServed,
    architecture_of,
    serve_parallel,
)
from backends.router import RoutedRun
from scenarios.validation.decisions import (
    CONTEXT,
    FLOAT32_BYTES,
    Panels,
    byte_lines,
    decision_line,
    replay,
    stopped_lines,
)
from scenarios.validation.routed import (
    RoutedPanels,
    batching_line,
    route_line,
    routed_byte_lines,
)
from scenarios.validation.verdict import Line, Verdict, judge_exact
from sim.engine import ReplicaLimits
from sim.models.architecture import Architecture
from sim.models.communication import iteration_collectives
from sim.models.work import IterationShape
from sim.processes.pace import Replayed
from sim.processes.router import Engines, RouterLog, simulate_replicas
from sim.trace import Trace
from sim.trace_merge import of_replica
from sim.workload.recorded import replayed
from sim.workload.source import Source

CONTROL = ("orders", "done")
"""What the engine sends to run its ranks: no model predicts it, so it is shown and not judged."""


def parallel_lines(name: str, run: ParallelRun) -> list[Line]:
    """Questions 1 and 2 for one policy."""
    try:
        return judge(name, run, serve_parallel(run))
    except ValueError as error:
        return stopped_lines(name, error)


def judge(name: str, run: ParallelRun, found: ParallelServed) -> list[Line]:
    """The lines of a real run; the simulated panel decides again at its instants.

    Raises:
        ValueError: a policy breaks its rules on the simulated panel.
    """
    config, served = architecture_of(run), found.served
    if run.lanes == 1:
        simulated = replay(served.trace, run.batching, run.limits, CONTEXT)
        panels = Panels(served, simulated)
        lines = [decision_line(name, panels), *byte_lines(name, panels, config)]
    else:
        simulated = replay_lanes(served.trace, run)
        lanes = RoutedPanels(RoutedRun(*served, sent_bytes=0, samplers=[]), simulated, run.lanes)
        lines = [
            route_line(name, lanes), batching_line(name, lanes),
            *routed_byte_lines(name, lanes, config),
        ]  # fmt: skip
    return [*lines, *sent_lines(name, found, simulated, config, run), control_line(name, found)]


def replay_lanes(real: Trace, run: ParallelRun) -> Trace:
    """Route and decide again, for all batches in flight, at the instants of a real trace."""
    requests = real.requests
    again = replayed(
        requests["arrival_s"], requests["prompt_tokens"], requests["output_tokens"]
    )  # fmt: skip
    paces = [Replayed.of(of_replica(real, lane)) for lane in range(run.lanes)]
    engines = Engines(batching=run.batching, limits=run.lane_limits, paces=paces, one_by_one=True)
    return simulate_replicas(Source(again, 0, CONTEXT), run.routing, engines, RouterLog.of(real))


def scaled(limits: ReplicaLimits, lanes: int) -> ReplicaLimits:
    """Limits of a replica each of whose lanes has these."""
    return limits._replace(
        max_num_seqs=lanes * limits.max_num_seqs, num_blocks=lanes * limits.num_blocks
    )


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
