"""The questions asked of a deployment that prefills on some instances and decodes on others."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from backends.corruption import Corruption
from backends.hand_over import InstanceSpec, serve_handed_over
from backends.ranks import require_ranks
from backends.reference import KeepLogits, OneRank, Reference
from backends.router import RoutedRun
from backends.serving import RANDOM, open_model, require_model
from scenarios.tables import console
from scenarios.validation import decisions, handed_over_time
from scenarios.validation.numbers import all_at_once, judge_answers, number_lines, tight_limits
from scenarios.validation.options import Fault, Question
from scenarios.validation.routed import (
    RoutedPanels,
    batching_line,
    choice_line,
    route_line,
    routed_byte_lines,
)
from scenarios.validation.several_ranks import prompts_of
from scenarios.validation.verdict import Line, judge_exact, not_run
from sim.models.architecture import Architecture
from sim.models.parameters import kv_bytes_per_token
from sim.policies.batching.base import Batching
from sim.processes.hand_over import simulate_hand_over
from sim.processes.kv_moves import HandOverLog, InstantTransport
from sim.processes.pace import Replayed
from sim.processes.router import Engines
from sim.trace import Trace
from sim.trace_merge import of_replica
from sim.workload.recorded import replayed
from sim.workload.source import Source

if TYPE_CHECKING:
    from scenarios.validation.ask import Plan
    from scenarios.validation.timing import Runs

HAND_OVER = (
    "request", "source", "replica", "kv_tokens", "outstanding_requests", "outstanding_tokens",
    "chosen_requests", "answers", "fetched_s",
)  # fmt: skip
"""What of a hand-over is decided, when it is fetched included."""


def answer(plan: "Plan") -> "tuple[list[Line], dict[str, Runs]]":
    """The lines of the questions that were asked, and the timed runs by policy.

    Raises:
        ValueError: instances, model or weights that are not there, before anything is run.
        RuntimeError: an instance was lost.
    """
    options, asked = plan.options, set(plan.options.only)
    require_ranks(plan.num_replicas, options.device.value)
    if asked & {Question.numbers, Question.time}:
        require_model(options.weights, options.device.value)
    lines: list[Line] = []
    runs: dict[str, Runs] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(errors=True), transient=True) as progress:
        if asked & {Question.decisions, Question.bytes}:
            task = progress.add_task("decisions and bytes", total=len(plan.policies))
            for name, batching in plan.policies.items():
                found = exact_lines(name, batching, plan)
                lines += [line for line in found if Question(line.question) in asked]
                progress.advance(task)
        if Question.numbers in asked:
            lines += _numbers(plan, progress)
        if Question.time in asked:
            if plan.options.device.value == "cpu" and plan.num_replicas > cores():
                why = f"{plan.num_replicas} instances on {cores()} cores wait for each other"
                lines.append(not_run(Question.time, why))
            else:
                runs, timed = handed_over_time.timed_runs(plan, progress)
                lines += timed
    return lines, runs


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def exact_lines(name: str, batching: Batching, plan: "Plan") -> list[Line]:
    """Questions 1 and 2 for one batching policy."""
    count, fault = plan.options.sizes.decision_requests, plan.options.corrupt
    # In mid-run, so that the fault meets a full pool.
    at = {Fault.skip_free: count // 2, Fault.drop_copy: count * 20, Fault.stale_block: count // 20}
    caching = plan.prefix_caching
    load = (decisions.shared_workload if caching else decisions.workload)(count)
    spec = InstanceSpec(
        weights=RANDOM, device=plan.options.device.value, batching=batching,
        limits=decisions.CACHING if caching else decisions.LIMITS, seed=plan.options.seed,
        corruption=None if fault is Fault.none else Corruption(kind=fault.value, index=at[fault]),
        plan=plan.instance_plan, num_instances=plan.num_replicas,
    )  # fmt: skip
    source = Source(load, plan.options.seed, decisions.CONTEXT)
    try:
        real = serve_handed_over(spec, source, plan.routing)
        hashes = [request.prefix_hashes for request in source.initial()] if caching else None
        simulated = replay(real.trace, plan, spec, hashes)
    except (ValueError, RuntimeError) as error:
        return decisions.stopped_lines(name, error)
    panels = RoutedPanels(real, simulated, plan.num_replicas)
    architecture = decisions.tiny_architecture()
    return [
        route_line(name, panels), choice_line(name, "hand-over", "hand_overs", HAND_OVER, panels),
        batching_line(name, panels), *routed_byte_lines(name, panels, architecture),
        moved_line(name, real, simulated, architecture, spec),
    ]  # fmt: skip


def replay(
    real: Trace, plan: "Plan", spec: InstanceSpec, hashes: Sequence[Sequence[int]] | None
) -> Trace:
    """Simulate the requests of a real trace, deciding again at its instants."""
    requests = real.requests
    again = replayed(
        requests["arrival_s"], requests["prompt_tokens"], requests["output_tokens"],
        prefix_hashes=hashes, hash_block_tokens=decisions.HASH_TOKENS,
    )  # fmt: skip
    paces = [Replayed.of(of_replica(real, at)) for at in range(spec.num_instances)]
    engines = Engines(batching=spec.batching, limits=spec.limits, paces=paces, one_by_one=True)
    return simulate_hand_over(
        Source(again, 0, decisions.CONTEXT), plan.routing, spec.plan, engines, InstantTransport, 0,
        log=HandOverLog.of(real),
    )  # fmt: skip


def moved_line(
    name: str, real: RoutedRun, simulated: Trace, architecture: Architecture, spec: InstanceSpec
) -> Line:
    """Question 2 for what instances send each other."""
    token_bytes = kv_bytes_per_token(architecture, decisions.FLOAT32_BYTES)
    tokens = map(spec.limits.block_tokens, simulated.hand_overs["kv_tokens"].tolist())
    ours, theirs = sum(tokens) * token_bytes, real.sent_bytes
    return Line(
        question="bytes", metric=f"{name}: KV bytes sent from instance to instance",
        simulated=f"{ours:,}", measured=f"{theirs:,}", error=abs(ours - theirs), accepted=0,
        verdict=judge_exact(abs(ours - theirs)),
    )  # fmt: skip


def _numbers(plan: "Plan", progress: Progress) -> list[Line]:
    """Question 3: tokens that were begun on one instance and ended on another."""
    options, sizes = plan.options, plan.options.sizes
    task = progress.add_task("numbers", total=1 + len(plan.policies))
    model, transformer = open_model(options.weights, options.device.value)
    asked = prompts_of(model, sizes.prompts)
    whole = model.folder is None
    reference = OneRank(transformer) if model.folder is None else Reference(
        model.folder, options.device.value
    )  # fmt: skip
    generated = reference.generate(asked, sizes.new_tokens)
    progress.advance(task)
    lines: list[Line] = []
    for name, batching in plan.policies.items():
        spec = InstanceSpec(
            weights=options.weights, device=options.device.value, batching=batching,
            limits=tight_limits(asked, sizes.new_tokens), plan=plan.instance_plan,
            num_instances=plan.num_replicas, prompts=asked, sampler=KeepLogits(),
        )  # fmt: skip
        load = all_at_once(asked, sizes.new_tokens)
        run = serve_handed_over(spec, Source(load, 0, transformer.max_context), plan.routing)
        answers = [run.answers[index] for index in range(len(asked))]
        found = judge_answers(asked, answers, generated, _kept(run), reference)
        lines += number_lines(
            name, found, len(asked), "one replica's" if whole else "transformers'"
        )
        progress.advance(task)
    return lines


def _kept(run: RoutedRun) -> KeepLogits:
    """The logits that all instances saw."""
    together = KeepLogits()
    for sampler in run.samplers:
        assert isinstance(sampler, KeepLogits)
        together.logits |= sampler.logits
    return together
