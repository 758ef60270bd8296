"""Asks the four questions of elastic instances."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from backends.corruption import Corruption
from backends.ranks import require_ranks
from backends.serving import require_model
from scenarios.tables import console
from scenarios.validation import elastic_both
from scenarios.validation.elastic import NUM_INSTANCES, cases, elastic_lines, exact_run
from scenarios.validation.elastic_both import InstanceRuns
from scenarios.validation.elastic_numbers import elastic_number_lines, scale_down_line
from scenarios.validation.options import Device, Fault, Options, Question
from scenarios.validation.verdict import Line, not_run
from sim.policies.elastic import ElasticPlan

if TYPE_CHECKING:
    from scenarios.validation.ask import Plan


def answer(
    plan: Plan, plans: Mapping[str, ElasticPlan]
) -> tuple[list[Line], Mapping[str, InstanceRuns]]:
    """The lines of the questions that were asked, and both panels of the picture.

    Args:
        plan: what to run.
        plans: every rule that is asked, by name.

    Raises:
        ValueError: ranks, model or weights that are not there, before anything is run.
        RuntimeError: an instance was lost; it is named.
    """
    options, asked = plan.options, set(plan.options.only)
    require_ranks(NUM_INSTANCES, options.device.value)
    if Question.numbers in asked:
        require_model(options.weights, options.device.value)
    lines: list[Line] = []
    runs: dict[str, InstanceRuns] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(errors=True), transient=True) as progress:
        if asked & {Question.decisions, Question.bytes}:
            lines += _exact(options, plans, progress)
        if Question.numbers in asked:
            task = progress.add_task("numbers", total=1)
            sizes = options.sizes
            lines += elastic_number_lines(
                options.weights, sizes.prompts, sizes.new_tokens, options.device.value
            )
            progress.advance(task)
        if Question.time in asked and options.device is Device.cuda:
            lines.append(not_run(Question.time, "timed on CPUs: a rank a core"))
        elif Question.time in asked:
            runs[plan.study], timed = elastic_both.timed(
                options.sizes.repeats, plan.accept, options.seed, progress
            )
            lines += timed
    return lines, runs


def _exact(options: Options, plans: Mapping[str, ElasticPlan], progress: Progress) -> list[Line]:
    """Decisions and bytes of every rule, and what proactive scale-down sends."""
    device, asked = options.device.value, set(options.only)
    chosen = list(cases(plans))
    task = progress.add_task("decisions and bytes", total=len(chosen) + 1)
    lines: list[Line] = []
    for case in chosen:
        run = exact_run(
            case.plan, options.sizes.decision_requests, options.seed, device=device,
            corruption=_corruption(options),
        )  # fmt: skip
        lines += [line for line in elastic_lines(case, run) if Question(line.question) in asked]
        progress.advance(task)
    if Question.bytes in asked:
        lines.append(scale_down_line(device))
    progress.advance(task)
    return lines


def _corruption(options: Options) -> Corruption | None:
    """In mid-run, so that the fault meets a pool in use; it strikes one instance of several."""
    count, fault = options.sizes.decision_requests, options.corrupt
    if fault is Fault.none:
        return None
    at = {Fault.skip_free: count // 10, Fault.drop_copy: count * 4}
    return Corruption(kind=fault.value, index=at[fault])
