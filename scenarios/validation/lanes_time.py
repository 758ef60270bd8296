"""Question 4 for several batches in flight: the ranks time one batch alone, and serve several.

The simulated stages share an iteration's seconds out by layers. How much ranks of one machine slow
each other down when all compute is measured between the runs, on requests of other lengths.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from backends.parallel import Driver
from backends.parallel_serving import ParallelRun
from backends.pipeline import serve_lanes
from scenarios.validation import timing
from scenarios.validation.intervals import Floats, two_stage
from scenarios.validation.timing import Runs
from scenarios.validation.verdict import Line, Verdict
from sim.costs.fitted import Fitted
from sim.lanes import lane_limits
from sim.models.architecture import Architecture
from sim.models.split import stage_layers
from sim.models.work import IterationShape
from sim.policies.batching.base import Batching
from sim.processes.pace import Jitter
from sim.processes.pipeline import Pipeline, lanes_of
from sim.processes.router import Engines, simulate_replicas
from sim.trace import Trace
from sim.workload.recorded import Recorded
from sim.workload.source import Source

FULL_REQUESTS, FULL_PROMPT_TOKENS, FULL_OUTPUT_TOKENS = 16, 20, 8
"""Requests that are there from the start, and keep all lanes full."""


class LanePanels(NamedTuple):
    """Both panels of a timed run with several batches in flight."""

    driver: Driver
    run: ParallelRun
    layers: Sequence[int]
    """Of each stage."""

    @classmethod
    def of(cls, driver: Driver, run: ParallelRun, architecture: Architecture) -> "LanePanels":
        """On the ranks of a driver."""
        stages = stage_layers(architecture.num_layers, run.pp_size)
        return cls(driver, run, [len(stage) for stage in stages])

    def serve(self, source: Source, batching: Batching, seed: int) -> Trace:
        """The real panel."""
        lanes, limits = self.run.lanes, lane_limits(timing.LIMITS, self.run.lanes)
        return serve_lanes(
            self.driver, source, batching, limits, self.run.routing, lanes, seed=seed
        ).trace

    def beside(self, cost: Fitted, batching: Batching) -> Fitted:
        """The cost with how much stages slow each other down: measured over predicted, the median.

        Of the iterations of full lanes, each predicted from the instant at which it began.
        """
        full = Recorded(
            arrival_s=[0.0] * FULL_REQUESTS, prompt_tokens=[FULL_PROMPT_TOKENS] * FULL_REQUESTS,
            output_tokens=[FULL_OUTPUT_TOKENS] * FULL_REQUESTS,
        )  # fmt: skip
        trace = self.serve(Source(full, 0, timing.CONTEXT), batching, 0)
        predicted, measured, alone = durations(trace, Pipeline(cost, self.layers))
        ratio = float(np.median((measured / predicted)[~alone]))
        return Fitted(cost.fit, max(ratio, 1.0))

    def predict(
        self, source: Source, batching: Batching, cost: Fitted, jitter: Jitter | None = None
    ) -> Trace:
        """The simulated panel."""
        lanes, limits = self.run.lanes, lane_limits(timing.LIMITS, self.run.lanes)
        paces = lanes_of([Pipeline(cost, self.layers, jitter)], lanes)
        engines = Engines(batching=batching, limits=limits, paces=paces)
        return simulate_replicas(source, self.run.routing, engines)

    def iteration_lines(
        self, runs: Mapping[str, Runs], costs: Sequence[Fitted], seed: int
    ) -> list[Line]:
        """Median error of an iteration's duration, of those alone in the stages and of others."""
        lines: list[Line] = []
        for name, one in runs.items():
            pairs = zip(one.measured, costs, strict=True)
            found = [durations(trace, Pipeline(cost, self.layers)) for trace, cost in pairs]
            for alone, what in ((True, "alone in the stages"), (False, "beside another")):
                sides = [
                    (ours[mine == alone], theirs[mine == alone])
                    for ours, theirs, mine in found
                    if (mine == alone).any()
                ]
                if sides:
                    lines.append(_line(f"{name}: iteration {what}, median error", sides, seed))
        slow_down = float(np.median([cost.slow_down for cost in costs]))
        line = Line(
            question="time", metric="stages that compute at once take longer by", simulated="",
            measured=f"{slow_down - 1:.1%}", error=None, verdict=Verdict.reported,
        )  # fmt: skip
        return [line, *lines]


def durations(trace: Trace, pipeline: Pipeline) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """Predicted and measured seconds of the iterations of a real trace, and which ran alone.

    Every iteration starts when the real one did.
    """
    columns = [trace.decisions[field].tolist() for field in IterationShape._fields]
    iterations = trace.iterations
    order = np.argsort(iterations["start_s"], kind="stable")
    start_s, end_s = iterations["start_s"][order], iterations["end_s"][order]
    shapes = [IterationShape(*row) for row in zip(*columns, strict=True)]
    predicted = np.array(
        [
            pipeline.enter(now_s, shapes[at]) - now_s
            for at, now_s in zip(order.tolist(), start_s.tolist(), strict=True)
        ]
    )
    before_s = np.maximum.accumulate(np.append(-np.inf, end_s))[:-1]
    after_s = np.append(start_s[1:], np.inf)
    return predicted, end_s - start_s, (before_s <= start_s) & (after_s >= end_s)


def _line(metric: str, sides: Sequence[tuple[Floats, Floats]], seed: int) -> Line:
    errors = [np.abs(ours / theirs - 1) for ours, theirs in sides]
    rows = [list(repeat[:, None]) for repeat in errors]
    low, high = two_stage(rows, lambda drawn: float(np.median(drawn)), seed)
    ours, theirs = (np.concatenate(side) for side in zip(*sides, strict=True))
    error = float(np.median(np.concatenate(errors)))
    return Line(
        question="time", metric=metric, simulated=f"{np.median(ours) * 1e3:.1f} ms",
        measured=f"{np.median(theirs) * 1e3:.1f} ms", error=error, low=low, high=high,
        verdict=Verdict.reported, note=f"{len(theirs):,} iterations",
    )  # fmt: skip
