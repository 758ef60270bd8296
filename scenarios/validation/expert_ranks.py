"""Asks the four questions of attention and expert ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from backends.expert_serving import TINY, ExpertRun, serve_experts
from backends.kv_cache import Corruption
from backends.ranks import require_ranks
from backends.reference import KeepLogits, OneRank
from backends.serving import RANDOM, require_model
from backends.transformer import Transformer
from backends.weights import Model, load_model, random_model, shipped_config
from scenarios.tables import console
from scenarios.validation import decisions, experts_time
from scenarios.validation.experts import expert_lines
from scenarios.validation.experts_time import PipelineRuns
from scenarios.validation.numbers import all_at_once, judge_answers, number_lines, tight_limits
from scenarios.validation.options import Device, Fault, Options, Question
from scenarios.validation.several_ranks import prompts_of
from scenarios.validation.verdict import Line, not_run
from sim.policies.expert_balance.static import Static

if TYPE_CHECKING:
    from scenarios.validation.ask import ExpertRules, Plan

NUM_ATTENTION, NUM_EXPERT_RANKS = 2, 2
"""Ranks that decide, send and compute; time is asked of one each: there may be two cores only."""
SPARE_SLOTS = 1
"""Replicas that each rank has room for, under a rule that makes some."""
LOGITS_ACCEPTED = 1e-4
"""Largest difference of a logit, float32 on both sides."""
HOT = 4.0
"""Load of the first expert of every layer over that of another, as the balance rule is told."""


def answer(plan: Plan, rules: ExpertRules) -> tuple[list[Line], Mapping[str, PipelineRuns]]:
    """The lines of the questions that were asked, and the picture of the timed runs.

    Raises:
        ValueError: ranks, model or weights that are not there, before anything is run.
        ChildProcessError: a rank was lost; it is named.
    """
    options, asked = plan.options, set(plan.options.only)
    require_ranks(NUM_ATTENTION + NUM_EXPERT_RANKS, options.device.value)
    weights = _weights(options)
    if weights != RANDOM:
        require_model(weights, options.device.value)
    lines: list[Line] = []
    runs: dict[str, PipelineRuns] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(errors=True), transient=True) as progress:
        if asked & {Question.decisions, Question.bytes}:
            cases = list(_cases(plan, rules))
            task = progress.add_task("decisions and bytes", total=len(cases))
            for name, fields in cases:
                found = expert_lines(name, _exact_run(options, fields))
                lines += [line for line in found if Question(line.question) in asked]
                progress.advance(task)
        if Question.numbers in asked:
            cases = list(_cases(plan, rules))
            task = progress.add_task("numbers", total=1 + len(cases))
            asking = _Numbers(options, weights)
            progress.advance(task)
            for name, fields in cases:
                lines += asking.lines(name, fields)
                progress.advance(task)
        if Question.time in asked and options.device is Device.cuda:
            lines.append(not_run(Question.time, "timed on CPUs, where links can be emulated"))
        elif Question.time in asked:
            runs[plan.study], timed = experts_time.timed(
                options.sizes.repeats, plan.accept, options.seed, progress
            )
            lines += timed
    return lines, runs


def _cases(plan: Plan, rules: ExpertRules) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each rule of a family, with one of every other family."""
    last = {
        "batching": list(plan.policies.values())[-1],
        "micro_batching": list(rules.micro_batchings.values())[-1],
        "expert_balance": next(iter(rules.balances.values())),
        "routing": next(iter(plan.routings.values())),
    }
    families: dict[str, Mapping[str, Any]] = {
        "batching": plan.policies, "micro_batching": rules.micro_batchings,
        "expert_balance": rules.balances, "routing": plan.routings,
    }  # fmt: skip
    seen: list[dict[str, Any]] = []
    for family, named in families.items():
        for name, rule in named.items():
            fields = last | {family: rule}
            if fields not in seen:
                seen.append(fields)
                yield (name if len(named) > 1 else f"{family} {name}"), fields


def _exact_run(options: Options, fields: dict[str, Any]) -> ExpertRun:
    count, fault = options.sizes.decision_requests, options.corrupt
    # In mid-run, so that the fault meets a full pool; every attention rank serves its share.
    at = {Fault.skip_free: count // 4, Fault.drop_copy: count * 10}
    run = ExpertRun(
        num_attention=NUM_ATTENTION, num_expert_ranks=NUM_EXPERT_RANKS,
        workload=decisions.workload(count), limits=decisions.LIMITS, seed=options.seed,
        device=options.device.value,
        corruption=None if fault is Fault.none else Corruption(kind=fault.value, index=at[fault]),
        **fields,
    )  # fmt: skip
    return _with_replicas(run, random_model(shipped_config(TINY)))


def _with_replicas(run: ExpertRun, model: Model) -> ExpertRun:
    """With a slot to spare on every expert rank, where the rule makes something of it."""
    experts, ranks = model.config.num_experts, run.num_expert_ranks
    if isinstance(run.expert_balance, Static):
        return run
    loads = [[HOT] + [1.0] * (experts - 1)] * model.config.num_layers
    return replace(run, slots_per_node=experts // ranks + SPARE_SLOTS, loads=loads)


def _weights(options: Options) -> str:
    """smollm2 has no experts: the tiny mixture stands in for it."""
    return RANDOM if options.weights == "smollm2" else options.weights


class _Numbers:
    """Question 3: the ranks' tokens against those of the same weights in one process."""

    def __init__(self, options: Options, weights: str) -> None:
        self._options, self._weights = options, weights
        random = weights == RANDOM
        self._model = random_model(shipped_config(TINY)) if random else load_model(weights)
        device = options.device.value
        self._asked = prompts_of(self._model, options.sizes.prompts)
        self._reference = OneRank(Transformer(self._model.config, self._model.weights, device))
        self._generated = self._reference.generate(self._asked, options.sizes.new_tokens)

    def lines(self, name: str, fields: dict[str, Any]) -> list[Line]:
        """Of one set of rules."""
        new_tokens = self._options.sizes.new_tokens
        run = ExpertRun(
            weights=self._weights, num_attention=NUM_ATTENTION, num_expert_ranks=NUM_EXPERT_RANKS,
            workload=all_at_once(self._asked, new_tokens), prompts=self._asked,
            limits=tight_limits(self._asked, new_tokens), sampler=KeepLogits(),
            device=self._options.device.value, **fields,
        )  # fmt: skip
        found = serve_experts(_with_replicas(run, self._model))
        kept = KeepLogits()
        for one in found.samplers:
            assert isinstance(one, KeepLogits)
            kept.logits |= one.logits
        answers = [found.answers[index] for index in range(len(self._asked))]
        judged = judge_answers(self._asked, answers, self._generated, kept, self._reference)
        about = "; of a tiny mixture of random weights" if self._weights == RANDOM else ""
        return number_lines(name, judged, len(self._asked), "one process's", about, LOGITS_ACCEPTED)
