"""Questions 1 to 3 for attention and expert ranks: decisions, dispatch lists, bytes, numbers.

The routing that the simulated panel is given was recorded from a single process that serves the
same requests, so that what the gates of the attention ranks choose is compared as well.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from backends.expert_serving import (
    TINY,
    ExpertRun,
    ExpertServed,
    architecture_of,
    layout_of,
    serve_experts,
)
from backends.router import RoutedRun
from backends.routing_record import RoutingRecord
from backends.serving import open_model, serve
from backends.weights import shipped_config
from scenarios.validation.decisions import CONTEXT, FLOAT32_BYTES, stopped_lines
from scenarios.validation.routed import (
    RoutedPanels,
    batching_line,
    route_line,
    routed_byte_lines,
)
from scenarios.validation.verdict import Line, judge_exact
from sim.dispatch_log import Dispatched, SimulatedDispatch
from sim.processes.expert_pace import ReplayedPipeline
from sim.processes.expert_pipeline import PipelineRules, simulate_expert_pipeline
from sim.trace import Trace
from sim.workload.recorded import replayed
from sim.workload.source import Source
from sim.workload.token_routing.choices_file import write_choices
from sim.workload.token_routing.recorded import Recorded


class ExpertPanels(NamedTuple):
    """The same requests on both panels."""

    real: ExpertServed
    simulated: Trace
    log: list[Dispatched]
    """What the simulated attention nodes sent."""


def expert_lines(name: str, run: ExpertRun) -> list[Line]:
    """Questions 1 and 2 for one set of rules."""
    try:
        panels = run_both(run)
    except ValueError as error:
        return stopped_lines(name, error)
    return judge(name, run, panels)


def judge(name: str, run: ExpertRun, panels: ExpertPanels) -> list[Line]:
    """Questions 1 and 2 of what both panels did."""
    config, real = architecture_of(run), panels.real
    routed = RoutedPanels(
        RoutedRun(real.trace, real.answers, *real.kv_bytes, sent_bytes=0, samplers=[]),
        panels.simulated, run.num_attention,
    )  # fmt: skip
    return [
        route_line(name, routed),
        batching_line(name, routed),
        dispatch_line(name, panels),
        *routed_byte_lines(name, routed, config),
        *pair_lines(name, panels, run, config.hidden_size * FLOAT32_BYTES),
    ]


def run_both(run: ExpertRun) -> ExpertPanels:
    """Serve for real, then decide again at the logged instants with the recorded routing.

    Raises:
        ValueError: a policy breaks its rules, a gate chose for a token that nobody recorded, or
            prompts are reused.
    """
    if run.limits.prefix_caching:
        raise ValueError(
            "limits.prefix_caching=True must be False here: a single process, whose routing is "
            "recorded, reuses other tokens; set engine.prefix_caching=false"
        )
    run = replace(run, keeps_log=True)
    real = serve_experts(run)
    with tempfile.TemporaryDirectory(prefix="diptych-routing-") as folder:
        path = Path(folder) / "routing.parquet"
        record_routing(run, path)
        return ExpertPanels(real, *simulate_again(run, real.trace, path))


def record_routing(run: ExpertRun, path: Path) -> None:
    """Write what the gates choose in a single process that serves the same requests."""
    config = shipped_config(TINY) if run.config is None else run.config
    _, model = open_model(run.weights, run.device, config=config)
    record = RoutingRecord(model)
    given = run.prompts
    source = Source(run.workload, run.seed, model.max_context)
    prompts = None if given is None else (lambda request: given[request.request_id])
    serve(
        model, source, run.batching, run.limits, seed=run.seed, prompts=prompts,
        warmed=record.clear,
    )  # fmt: skip
    write_choices(path, *record.table())


def simulate_again(run: ExpertRun, real: Trace, routing: Path) -> tuple[Trace, list[Dispatched]]:
    """The simulated panel at the instants of a real trace, with a recorded routing."""
    config = architecture_of(run)
    layout = layout_of(run, config)
    requests = real.requests
    again = replayed(requests["arrival_s"], requests["prompt_tokens"], requests["output_tokens"])
    sent = SimulatedDispatch(
        Recorded(path=str(routing)), run.seed, layout.placement,
        (config.num_experts, config.experts_per_token),
    )  # fmt: skip
    simulated = simulate_expert_pipeline(
        Source(again, 0, CONTEXT),
        PipelineRules(run.batching, run.micro_batching, run.routing),
        run.limits, (run.num_attention, layout.num_micro_batches), ReplayedPipeline.of(real),
        lambda instant_s, batches: sent(instant_s, list(batches)),
    )  # fmt: skip
    return simulated, sent.log


def dispatch_line(name: str, panels: ExpertPanels) -> Line:
    """Whether every attention node sent the same rows, in the same order."""
    ours, theirs = _by_source(panels.log), _by_source(panels.real.log)
    count, first = 0, ""
    for source in sorted(ours.keys() | theirs.keys()):
        pairs = zip_longest(ours.get(source, ()), theirs.get(source, ()))
        differing = [pair for pair in pairs if pair[0] != pair[1]]
        count += len(differing)
        if differing and not first:
            first = f"first: {differing[0][0]} simulated, {differing[0][1]} measured"
    return Line(
        question="decisions", metric=f"{name}: dispatch lists that differ",
        simulated=f"{len(panels.log):,}", measured=f"{len(panels.real.log):,}", error=count,
        accepted=0, verdict=judge_exact(count),
        note=first or "of every layer, micro-batch and pair of nodes: which rows, in which order",
    )  # fmt: skip


def pair_lines(name: str, panels: ExpertPanels, run: ExpertRun, row_bytes: int) -> list[Line]:
    """Bytes of rows from every rank to every other."""
    ours: Counter[tuple[int, int]] = Counter()
    for one in panels.log:
        expert_rank = run.num_attention + one.target
        ours[one.source, expert_rank] += one.rows * row_bytes
        ours[expert_rank, one.source] += one.rows * row_bytes
    theirs = panels.real.payload_bytes()
    return [
        Line(
            question="bytes", metric=f"{name}: rows from rank {pair[0]} to {pair[1]}",
            simulated=f"{ours[pair]:,}", measured=f"{theirs[pair]:,}",
            error=abs(ours[pair] - theirs[pair]), accepted=0,
            verdict=judge_exact(abs(ours[pair] - theirs[pair])),
        )
        for pair in sorted(ours.keys() | theirs.keys())
    ]  # fmt: skip


def _by_source(log: Sequence[Dispatched]) -> dict[int, list[Dispatched]]:
    found: dict[int, list[Dispatched]] = {}
    for one in log:
        found.setdefault(one.source, []).append(one)
    return found
