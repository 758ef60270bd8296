"""Asks the four questions in their order, each on both panels."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from backends.executor import Executor
from backends.kv_cache import Corruption
from backends.reference import Reference
from backends.serving import open_model, require_model, use_one_thread
from backends.transformer import Transformer
from backends.weights import random_model
from scenarios.tables import console
from scenarios.validation import (
    elastic_ranks,
    expert_ranks,
    handed_over,
    knowledge,
    several_ranks,
    timing,
)
from scenarios.validation.calibrated import CalibratedCosts
from scenarios.validation.decisions import exact_lines
from scenarios.validation.elastic_both import InstanceRuns
from scenarios.validation.experts_time import PipelineRuns
from scenarios.validation.failing import failing_lines
from scenarios.validation.lanes_time import LanePanels
from scenarios.validation.numbers import compare, number_lines
from scenarios.validation.options import Fault, Options, Question
from scenarios.validation.routed import RoutedCase, routed_lines
from scenarios.validation.timing import Runs
from scenarios.validation.verdict import Line, not_run
from sim.costs.fitted import Fitted
from sim.faults import Fault as PartFault
from sim.knowledge_rules import Rules
from sim.policies.batching.base import Batching
from sim.policies.cache_eviction.base import CacheEviction
from sim.policies.elastic import ElasticPlan
from sim.policies.expert_balance.base import ExpertBalance
from sim.policies.instance_plan.base import InstancePlan, phases
from sim.policies.instance_plan.colocated import Colocated
from sim.policies.micro_batching.base import MicroBatching
from sim.policies.routing.base import Routing
from sim.processes.pace import Jitter
from sim.trace import Trace
from sim.workload.source import Source


class KnowledgePlan(NamedTuple):
    """What of a study its knowledge cache decides."""

    rules: Rules
    evictions: Mapping[str, CacheEviction]
    """Every rule that is asked, by name."""


class ExpertRules(NamedTuple):
    """What of a study its attention and expert ranks decide; every rule that is asked, by name."""

    micro_batchings: Mapping[str, MicroBatching]
    balances: Mapping[str, ExpertBalance]


class Plan(NamedTuple):
    """What a validation will run."""

    study: str
    options: Options
    policies: dict[str, Batching]
    """Each with a token budget that cuts the short prompts of the validation."""
    accept: dict[str, float]
    out: Path
    prefix_caching: bool = False
    """Whether decisions, bytes and numbers are asked of replicas that cache prefixes."""
    num_replicas: int = 1
    """Above 1: decisions and bytes are asked of a deployment as well."""
    routings: Mapping[str, Routing] = MappingProxyType({})
    """Rules of the router that are asked."""
    tp_size: int = 1
    pp_size: int = 1
    instance_plan: InstancePlan = Colocated()
    faults: tuple[PartFault, ...] = ()
    """Of the study: the deployment is asked with them as well."""
    batches_in_flight: int | None = None
    """Of a replica of several stages."""
    knowledge: KnowledgePlan | None = None
    """Of a study that retrieves documents: what is asked is its knowledge cache."""
    experts: ExpertRules | None = None
    """Of a study whose plan places experts: what is asked is attention and expert ranks."""
    elastic: Mapping[str, ElasticPlan] | None = None
    """Of a study whose instances form groups anew: every plan that is asked, by name."""

    @property
    def routing(self) -> Routing:
        """The first rule of the router."""
        return next(iter(self.routings.values()))


def answer(plan: Plan) -> tuple[list[Line], Mapping[str, Runs | PipelineRuns | InstanceRuns]]:
    """Every line of the table, and the timed runs by policy (none if time was not asked about)."""
    use_one_thread()
    asked = set(plan.options.only)
    if plan.knowledge is not None:
        lines, runs = knowledge.answer(plan)
        return _in_order(lines, asked), runs
    if plan.experts is not None:
        lines, runs = expert_ranks.answer(plan, plan.experts)
        return _in_order(lines, asked), runs
    if plan.elastic is not None:
        lines, runs = elastic_ranks.answer(plan, plan.elastic)
        return _in_order(lines, asked), runs
    if plan.tp_size * plan.pp_size > 1:
        lines, runs = several_ranks.answer(plan)
        return _in_order(lines, asked), runs
    if phases(plan.instance_plan, plan.num_replicas)[1]:
        lines, runs = handed_over.answer(plan)
        return _in_order(lines, asked), runs
    if asked & {Question.numbers, Question.time}:
        require_model(plan.options.weights, plan.options.device.value)
    lines, runs = [], {}
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(errors=True), transient=True) as progress:
        if asked & {Question.decisions, Question.bytes}:
            lines += _decisions_and_bytes(plan, progress)
        if asked & {Question.numbers, Question.time}:
            task = progress.add_task("loading the model", total=None)
            model, transformer = open_model(
                plan.options.weights,
                plan.options.device.value,
                lambda text: progress.update(task, description=text),
            )
            progress.remove_task(task)
            if Question.numbers in asked:
                lines += _numbers(plan, transformer, model.folder, progress)
            if Question.time in asked:
                runs, timed = timed_runs(plan, transformer, model.name, progress)
                lines += timed
    return _in_order(lines, asked), runs


def _in_order(lines: list[Line], asked: set[Question]) -> list[Line]:
    """All lines by question, with a word on those that were not asked."""
    left_out = [not_run(q, "left out by only=") for q in Question if q not in asked]
    order = [question.value for question in Question]
    return sorted(lines + left_out, key=lambda line: order.index(line.question))


def _decisions_and_bytes(plan: Plan, progress: Progress) -> list[Line]:
    tiny = open_model("random", plan.options.device.value)[1]
    count = plan.options.sizes.decision_requests
    fault = plan.options.corrupt
    # In mid-run, so that the fault meets a full pool.
    at = {Fault.skip_free: count // 2, Fault.drop_copy: count * 20, Fault.stale_block: count // 20}
    lines: list[Line] = []
    task = progress.add_task("decisions and bytes", total=len(plan.policies))
    for name, batching in plan.policies.items():
        corruption = None if fault is Fault.none else Corruption(kind=fault.value, index=at[fault])
        found = exact_lines(
            name, tiny, batching, count, plan.options.seed, corruption,
            prefix_caching=plan.prefix_caching,
        )  # fmt: skip
        lines += [line for line in found if Question(line.question) in plan.options.only]
        progress.advance(task)
    return lines + (_routed(plan, progress) if plan.routings else [])


def _routed(plan: Plan, progress: Progress) -> list[Line]:
    """Decisions and bytes of several replicas behind a router, under the last batching policy."""
    architecture = random_model().config
    fault, count = plan.options.corrupt, plan.options.sizes.decision_requests
    corruption = None if fault is Fault.none else Corruption(kind=fault.value, index=count // 20)
    batching = list(plan.policies.values())[-1]
    lines: list[Line] = []
    task = progress.add_task("routing", total=len(plan.routings))
    for name, routing in plan.routings.items():
        case = RoutedCase(
            routing, batching, plan.num_replicas, count, plan.prefix_caching, plan.options.seed,
            corruption, plan.options.device.value,
        )  # fmt: skip
        found = routed_lines(name, case, architecture)
        if plan.faults:
            found += failing_lines(name, case, plan.faults, architecture)
        lines += [line for line in found if Question(line.question) in plan.options.only]
        progress.advance(task)
    return lines


def _numbers(
    plan: Plan, transformer: Transformer, folder: Path | None, progress: Progress
) -> list[Line]:
    if folder is None:
        return [not_run(Question.numbers, f"weights={plan.options.weights} has no reference")]
    sizes = plan.options.sizes
    reference = Reference(folder, plan.options.device.value)
    lines: list[Line] = []
    task = progress.add_task("numbers", total=len(plan.policies))
    for name, batching in plan.policies.items():
        found = compare(
            transformer, folder, reference, batching, sizes.prompts, sizes.new_tokens,
            prefix_caching=plan.prefix_caching,
        )  # fmt: skip
        lines += number_lines(name, found, sizes.prompts)
        progress.advance(task)
    return lines


def timed_runs(
    plan: Plan, transformer: Executor, model: str, progress: Progress,
    lanes: LanePanels | None = None,
) -> tuple[dict[str, Runs], list[Line]]:  # fmt: skip
    """Time every policy; the passes of the calibration lie between the runs.

    Args:
        plan: what to run.
        transformer: what is calibrated, one batch alone.
        model: its name in the calibration.
        progress: shown.
        lanes: where several batches are in flight; None: one.
    """
    panels = lanes or timing.OneBatch(transformer)
    sizes, seed = plan.options.sizes, plan.options.seed
    names = list(plan.policies)
    task = progress.add_task("time", total=1 + sizes.repeats * len(names))
    costs = CalibratedCosts(plan.options, transformer, model)
    progress.advance(task)
    rate = plan.options.load * timing.capacity_per_s(
        plan.policies.values(), panels.beside(costs.cost(), plan.policies[names[0]]), panels
    )
    requests = timing.workload(rate, sizes.time_requests)

    def source() -> Source:
        return Source(requests, seed, timing.CONTEXT)

    measured: dict[str, list[Trace]] = {name: [] for name in names}
    spent: list[Fitted] = []
    for repeat in range(sizes.repeats):
        # Interleaved, and each policy in each place: what one leaves behind averages out.
        first = repeat % len(names)
        for part, name in enumerate((*names[first:], *names[:first])):
            measured[name].append(panels.serve(source(), plan.policies[name], seed))
            costs.refresh(part, len(names))
            progress.advance(task)
        spent.append(panels.beside(costs.cost(repeat), plan.policies[names[first]]))
    costs.keep()
    jitter = costs.jitter()
    runs = {
        name: Runs(
            [panels.predict(source(), plan.policies[name], cost) for cost in spent],
            traces,
            [*spent] if lanes is None else [],
            [
                panels.predict(source(), plan.policies[name], cost, Jitter(jitter, repeat))
                for repeat, cost in enumerate(spent)
            ],
        )
        for name, traces in measured.items()
    }
    lines = timing.time_lines(runs, plan.accept, costs.spread(), seed)
    return runs, lines + ([] if lanes is None else lanes.iteration_lines(runs, spent, seed))
