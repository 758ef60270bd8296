"""The questions asked of a knowledge cache: decisions of every rule, bytes, numbers and time."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from backends.corruption import Corruption
from backends.knowledge_cache import Answered, serve_knowledge
from backends.reference import KeepLogits, Reference
from backends.serving import open_model, require_model
from backends.tokenizer import Tokenizer
from scenarios.tables import console
from scenarios.validation import knowledge_cases as cases
from scenarios.validation import knowledge_time
from scenarios.validation.decisions import FLOAT32_BYTES, decision_line, stopped_lines
from scenarios.validation.knowledge_cases import Case
from scenarios.validation.numbers import judge_answers, number_lines
from scenarios.validation.options import Fault, Question
from scenarios.validation.timing import Runs
from scenarios.validation.verdict import Line, judge_exact, not_run
from sim.generations import GIVEN_UP, LOST
from sim.knowledge_mishaps import NO_MISHAPS, Mishaps
from sim.knowledge_rules import Rules, copied_blocks
from sim.models.architecture import Architecture
from sim.models.parameters import kv_bytes_per_token
from sim.policies.request_order.fcfs import Fcfs
from sim.processes.knowledge_cache import Search, StageLog, simulate_knowledge
from sim.processes.pace import Replayed
from sim.state.knowledge_tree import Move, MoveKind
from sim.trace import Array, Trace
from sim.work_done import work_done

if TYPE_CHECKING:
    from scenarios.validation.ask import Plan

REQUESTS_PER_DECISION = 10
"""Requests are short here, so that so many times the usual number is asked for."""
REPLICATE_FROM = 3
"""Uses after which a document has its copy ahead of need, where the GPU tier is lost."""
TIMEOUT_S = 1.0
"""How long clients wait there."""
NOT_COMPARED = ("instant_s", "took_s")
"""Of tables that are compared: a panel may note a step later than it decided it."""


class KnowledgePanels(NamedTuple):
    """The same questions on both panels."""

    real: Answered
    simulated: Trace


def answer(plan: "Plan") -> tuple[list[Line], dict[str, Runs]]:
    """The lines of the questions that were asked, and the timed runs by what is kept.

    Raises:
        ValueError: a model that is not there, before anything is run.
    """
    asked, knowledge = set(plan.options.only), plan.knowledge
    assert knowledge is not None, "asked of studies that retrieve"
    if asked & {Question.numbers, Question.time}:
        require_model(plan.options.weights, plan.options.device.value)
    lines: list[Line] = []
    runs: dict[str, Runs] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(errors=True), transient=True) as progress:
        if asked & {Question.decisions, Question.bytes}:
            task = progress.add_task("decisions and bytes", total=1 + len(knowledge.evictions))
            found: list[Line] = []
            for name, rule in knowledge.evictions.items():
                found += exact_lines(name, knowledge.rules._replace(cache_eviction=rule), plan)
                progress.advance(task)
            if plan.options.corrupt is Fault.none:
                found += mishap_lines(knowledge.rules, plan)
            lines += [line for line in found if Question(line.question) in asked]
        if Question.numbers in asked:
            # In order of arrival: sorted by what is cached, hardly anything is swapped in between.
            lines += _numbers(plan, knowledge.rules._replace(request_order=Fcfs()), progress)
        if Question.time in asked:
            runs, timed = knowledge_time.timed_runs(plan, progress)
            lines += timed
    return lines, runs


def exact_lines(name: str, rules: Rules, plan: "Plan") -> list[Line]:
    """Questions 1 and 2 for one eviction rule."""
    options = plan.options
    count = options.sizes.decision_requests * REQUESTS_PER_DECISION
    fault = options.corrupt
    corruption = None if fault is Fault.none else Corruption(kind=fault.value, index=count // 20)
    try:
        panels = run_both(
            rules, cases.tiny(count, options.seed), options.seed, options.device.value, corruption
        )
    except ValueError as error:
        return stopped_lines(name, error)
    return _compared(name, panels)


def mishap_lines(rules: Rules, plan: "Plan") -> list[Line]:
    """Questions 1 and 2 where the GPU tier is lost twice and clients leave; are answers right?"""
    options, name = plan.options, "GPU tier lost, clients leave"
    count = options.sizes.decision_requests * REQUESTS_PER_DECISION // 4
    case = cases.tiny(count, options.seed)
    case = case._replace(tiers=case.tiers._replace(replicate_from=REPLICATE_FROM))
    span_s = count / cases.RATE_PER_S
    mishaps = Mishaps(lost_s=(span_s / 3, 2 * span_s / 3), timeout_s=TIMEOUT_S)
    plain = case._replace(tiers=case.tiers._replace(reuse=False))
    try:
        panels = run_both(rules, case, options.seed, options.device.value, mishaps=mishaps)
        right = run_real(rules, plain, options.seed, options.device.value).answers
    except ValueError as error:
        return stopped_lines(name, error)
    wrong = sum(right[one] != answer for one, answer in panels.real.answers.items())
    stages = panels.real.trace.stages["stage"].tolist()
    note = f"{name}: {stages.count(LOST)} losses, {stages.count(GIVEN_UP)} of {count} clients left"
    answers = Line(
        question="decisions", metric=f"{name}: answers other than without any cache",
        simulated="", measured=f"{len(panels.real.answers):,} answers", error=wrong, accepted=0,
        verdict=judge_exact(wrong), note=note,
    )  # fmt: skip
    return [*_compared(name, panels), answers]


def _compared(name: str, panels: KnowledgePanels) -> list[Line]:
    """Batches, tables and bytes of both panels."""
    return [
        decision_line(name, panels),
        *(table_line(name, what, table, panels) for what, table in TABLES.items()),
        *byte_lines(name, panels, open_model("random", "cpu")[1].config),
    ]


TABLES = {
    "stages that start or stop otherwise": "stages",
    "hits and misses that differ": "lookups",
    "moves between the tiers that differ": "moves",
}
"""What is compared row by row, in order, beside the batches."""


def run_both(
    rules: Rules, case: Case, seed: int, device: str, corruption: Corruption | None = None,
    mishaps: Mishaps = NO_MISHAPS,
) -> KnowledgePanels:  # fmt: skip
    """Search and answer for real, then replay the logged instants on the simulated panel."""
    real = run_real(rules, case, seed, device, corruption, mishaps)
    return KnowledgePanels(real, replay(real.trace, rules, case))


def run_real(
    rules: Rules, case: Case, seed: int, device: str, corruption: Corruption | None = None,
    mishaps: Mishaps = NO_MISHAPS,
) -> Answered:  # fmt: skip
    """Search and answer for real, with the tiny model."""
    model = open_model("random", device)[1]
    texts = case.texts(model.config.vocab_size, seed)
    return serve_knowledge(
        model, case.questions, case.searcher(), texts, rules, case.limits, case.tiers,
        corruption=corruption, mishaps=mishaps,
    )  # fmt: skip


def replay(real: Trace, rules: Rules, case: Case) -> Trace:
    """Decide again at a real trace's instants, about documents found by a search of its own."""
    return simulate_knowledge(
        iter(case.questions), rules, case.limits, Replayed.of(real), case.tiers,
        Search(0.0, 0.0, 1), StageLog.of(real), one_by_one=True,
    )  # fmt: skip


def table_line(name: str, what: str, table: str, panels: KnowledgePanels) -> Line:
    """Question 1 for one table: rows that differ, in order."""
    ours, theirs = (_rows(getattr(trace, table)) for trace in (panels.simulated, panels.real.trace))
    both = min(len(ours), len(theirs))
    differing = np.flatnonzero((ours[:both] != theirs[:both]).any(axis=1))
    count = len(differing) + abs(len(ours) - len(theirs))
    note = ""
    if len(differing):
        at = int(differing[0])
        columns = [key for key in getattr(panels.simulated, table) if key not in NOT_COMPARED]
        note = f"first at row {at}: {columns} {ours[at]} simulated, {theirs[at]} measured"
    return Line(
        question="decisions", metric=f"{name}: {what}", simulated=f"{len(ours):,}",
        measured=f"{len(theirs):,}", error=count, accepted=0, verdict=judge_exact(count), note=note,
    )  # fmt: skip


def byte_lines(name: str, panels: KnowledgePanels, config: Architecture) -> list[Line]:
    """Question 2: KV written and read by forward passes, and copied between the tiers."""
    per_token = kv_bytes_per_token(config, FLOAT32_BYTES)
    done = work_done(panels.simulated, config, per_token)
    out, back = copied_blocks(_moves(panels.simulated.moves))
    block_bytes = per_token * cases.LIMITS.block_size
    real = panels.real
    pairs = {
        "written": (done.kv_bytes_written, real.kv_bytes_written),
        "read": (done.kv_bytes_read, real.kv_bytes_read),
        "swapped out": (out * block_bytes, real.bytes_swapped_out),
        "loaded": (back * block_bytes, real.bytes_loaded),
    }
    return [
        Line(
            question="bytes", metric=f"{name}: KV bytes {what}", simulated=f"{ours:,}",
            measured=f"{theirs:,}", error=abs(ours - theirs), accepted=0,
            verdict=judge_exact(abs(ours - theirs)),
        )
        for what, (ours, theirs) in pairs.items()
    ]  # fmt: skip


def _numbers(plan: "Plan", rules: Rules, progress: Progress) -> list[Line]:
    """Question 3: answers behind any mix of cached documents, against a full recomputation."""
    options, sizes = plan.options, plan.options.sizes
    task = progress.add_task("numbers", total=3)
    model, transformer = open_model(options.weights, options.device.value)
    if model.folder is None:
        return [not_run(Question.numbers, f"weights={options.weights} has no reference")]
    case, texts = cases.readable(
        Tokenizer(model.folder), sizes.prompts, sizes.new_tokens, options.seed
    )
    progress.advance(task)
    kept = KeepLogits()
    real = serve_knowledge(
        transformer, case.questions, case.searcher(), texts, rules, case.limits, case.tiers,
        sampler=kept,
    )  # fmt: skip
    progress.advance(task)
    asked = [
        texts.prompt(one.request.request_id, one.stages[-1]) for one in case.questions
    ]  # fmt: skip
    reference = Reference(model.folder, options.device.value)
    generated = reference.generate(asked, sizes.new_tokens)
    answers = [real.answers[number] for number in range(len(asked))]
    found = judge_answers(asked, answers, generated, _by_request(kept, real.trace), reference)
    progress.advance(task)
    lookups = real.trace.lookups
    hits = [int(lookups[f"{where}_documents"].sum()) for where in ("gpu", "host", "missed")]
    about = "; documents found on the device {}, in host memory {}, computed {}".format(*hits)
    return number_lines("knowledge cache", found, len(asked), about=about)


def _by_request(kept: KeepLogits, trace: Trace) -> KeepLogits:
    """Logits of the generations that answer, under the request that they answer."""
    request_of = dict(
        zip(trace.searches["generation"].tolist(), trace.searches["request"].tolist(), strict=True)
    )
    mine = KeepLogits()
    mine.logits = {
        (request_of[generation], position): row
        for (generation, position), row in kept.logits.items()
        if generation in request_of
    }
    return mine


def _rows(table: Mapping[str, Array]) -> np.ndarray:
    columns = [column for name, column in table.items() if name not in NOT_COMPARED]
    return np.stack(columns, axis=1)


def _moves(table: Mapping[str, Array]) -> list[Move]:
    rows = zip(*(table[name].tolist() for name in ("kind", "node", "document", "blocks")),
               strict=True)  # fmt: skip
    return [Move(MoveKind(kind), *rest) for kind, *rest in rows]
