"""`diptych validate`: run both panels, answer the four questions, draw the diptych.

Exit code 0 unless a line missed (1) or the command was refused (2).
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scenarios.compose import compose_config, parse, refuse_flags, studies, typed
from scenarios.study import Study
from scenarios.tables import console, grid
from scenarios.validation.options import Fault, Options, split, with_short_chunks
from scenarios.validation.verdict import Line, Verdict
from sim.elastic_setup import is_elastic
from sim.expert_setup import places_experts
from sim.files import claim_folder, whole_folder, write_json
from sim.knowledge_setup import retrieves, rules_of
from sim.policies.batching.base import Batching
from sim.policies.elastic import ElasticPlan
from sim.policies.routing.base import Routing
from sim.provenance import provenance
from sim.result import plain
from sim.setup import lanes_of_replica

if TYPE_CHECKING:
    from scenarios.validation.ask import Plan
    from scenarios.validation.elastic_both import InstanceRuns
    from scenarios.validation.experts_time import PipelineRuns
    from scenarios.validation.timing import Runs

ANSWERS = "validation.json"
PICTURE = "timeline.png"
REQUESTS = "requests.png"
PLAN = "policy/instance_plan="
TAKEN = (
    "policy", "accept", "engine.prefix_caching", "engine.batches_in_flight", "num_replicas",
    "tp_size", "pp_size", "faults",
)  # fmt: skip
"""What the validation takes from the study; models, limits and loads are its own."""
COLOURS = {
    Verdict.passed: "green", Verdict.missed: "bold red", Verdict.too_noisy: "yellow",
    Verdict.not_run: "dim", Verdict.reported: "dim",
}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Validate a study; print the table; write validation.json and timeline.png."""
    command = parse(argv)
    refuse_flags(command, "validate")
    if command.study is None:
        table = grid("Studies: diptych validate -cn STUDY", "study", "question", left=2)
        for name, question in studies(command.config_dir).items():
            table.add_row(name, question)
        console().print(table)
        return 2
    options, overrides = split(command.overrides)
    plan = _plan(command.study, options, overrides, command.config_dir)
    from scenarios.validation.ask import answer

    lines, runs = answer(plan)
    _write(plan, lines, runs)  # first: what took minutes outlives a closed pipe
    _show(plan, lines)
    written = ", ".join(name for name in (ANSWERS, PICTURE, REQUESTS) if (plan.out / name).exists())
    console().print(f"written to {plan.out}: {written}")
    return int(any(line.verdict is Verdict.missed for line in lines))


def _plan(study: str, options: Options, overrides: Sequence[str], config_dir: str | None) -> "Plan":
    """Compose the study once for each policy.

    Raises:
        ValueError: an unknown key or name, or an output folder that holds something else.
    """
    from scenarios.validation.ask import ExpertRules, KnowledgePlan, Plan

    families = ("batching", "routing", "cache_eviction", "micro_batching", "expert_balance")
    names = _rule_names(families, study, overrides, config_dir)
    chosen = tuple(f"policy/{family}=" for family in families)
    rest = [text for text in overrides if not text.startswith(chosen)]
    # Of several plans the first one says what kind of study this is.
    rest = [text.split(",")[0] if text.startswith(PLAN) else text for text in rest]

    def composed(family: str, name: str) -> Study:
        return typed(compose_config(study, [*rest, f"policy/{family}={name}"], config_dir))

    studies_of = {name: composed("batching", name) for name in names["batching"]}
    policies: dict[str, Batching] = {
        name: with_short_chunks(one.policy.batching) for name, one in studies_of.items()
    }
    last = list(studies_of.values())[-1]
    accept, prefix_caching = dict(last.accept), last.engine.prefix_caching
    judged = _accept_keys(last)
    unknown = sorted(set(accept) - set(judged))
    if unknown:
        raise ValueError(
            f"accept names {unknown}, which nothing judges; there are: {', '.join(judged)}"
        )
    _warn_of_no_effect(rest)
    _require_fault(study, options, last)
    out = Path(options.out or Path("runs") / study / "validation")
    claim_folder(out, (ANSWERS, PICTURE, REQUESTS), "validation")
    routings: dict[str, Routing] = {}
    lanes = lanes_of_replica(last)
    if last.num_replicas * lanes > 1 or last.faults or places_experts(last):
        routings = {name: composed("routing", name).policy.routing for name in names["routing"]}
    sizes = (last.tp_size, last.pp_size)
    _require_one_replica(last)

    def rules(family: str) -> dict[str, Any]:
        return {name: getattr(composed(family, name).policy, family) for name in names[family]}

    knowledge = KnowledgePlan(rules_of(last), rules("cache_eviction")) if retrieves(last) else None
    experts = None
    if places_experts(last):
        experts = ExpertRules(rules("micro_batching"), rules("expert_balance"))
    elastic = None
    if is_elastic(last):
        _require_no_faults(last)
        plans = _rule_names(("instance_plan",), study, overrides, config_dir)["instance_plan"]
        elastic = _elastic_plans({name: composed("instance_plan", name) for name in plans})
    return Plan(
        study, options, policies, accept, out, prefix_caching, last.num_replicas, routings, *sizes,
        last.policy.instance_plan, tuple(last.faults), lanes, knowledge, experts, elastic,
    )  # fmt: skip


def _elastic_plans(studies_of: Mapping[str, Study]) -> dict[str, ElasticPlan]:
    """The plan of each study.

    Raises:
        ValueError: one of them does not form groups anew.
    """
    found: dict[str, ElasticPlan] = {}
    for name, one in studies_of.items():
        plan = one.policy.instance_plan
        if not isinstance(plan, ElasticPlan):
            raise ValueError(
                f"policy/instance_plan={name} forms no groups and is validated by itself; leave it "
                "out beside elastic plans"
            )
        found[name] = plan
    return found


def _require_no_faults(study: Study) -> None:
    """Refuse losses, which the replay of elastic instances does not take.

    Raises:
        ValueError: the study has some.
    """
    if study.faults:
        raise ValueError(
            "faults are not validated for elastic instances; set faults=[] (the laws of losses are "
            "tested in tests/pairs)"
        )


def _require_one_replica(study: Study) -> None:
    """Refuse several ranks together with what is validated on one rank alone.

    Raises:
        ValueError: says what to leave out.
    """
    several = study.tp_size * study.pp_size > 1 and not is_elastic(study)
    if several and (study.engine.prefix_caching or study.num_replicas > 1 or study.faults):
        raise ValueError(
            f"tp_size={study.tp_size} and pp_size={study.pp_size} are validated for one replica "
            "without a prefix cache and without faults; set engine.prefix_caching=false, "
            "num_replicas=1 and faults=[], or validate one rank"
        )


def _accept_keys(study: Study) -> tuple[str, ...]:
    """What a study may name under `accept`."""
    from scenarios.validation import elastic_time, experts_time, knowledge_time, timing

    if is_elastic(study):
        return elastic_time.ACCEPT_KEYS
    if retrieves(study):
        return knowledge_time.ACCEPT_KEYS
    return experts_time.ACCEPT_KEYS if places_experts(study) else timing.ACCEPT_KEYS


def _require_fault(study: str, options: Options, last: Study) -> None:
    """Refuse a fault that the study cannot have.

    Raises:
        ValueError: it keeps no prefixes whose blocks could be stale.
    """
    if options.corrupt is Fault.stale_block and retrieves(last):
        raise ValueError(
            f"corrupt=stale_block is a fault of prefix caching, and study {study} keeps documents "
            "instead; take corrupt=skip_free or drop_copy"
        )
    if options.corrupt is Fault.stale_block and not last.engine.prefix_caching:
        raise ValueError(
            "corrupt=stale_block needs blocks that stay cached; add engine.prefix_caching=true"
        )


def _warn_of_no_effect(overrides: Sequence[str]) -> None:
    """Say which settings of the study the validation does not take."""
    for text in overrides:
        if not text.lstrip("+~").startswith(TAKEN):
            warnings.warn(
                f"{text} has no effect on the validation, which has its own small models and "
                "workloads; see docs/validation.md",
                stacklevel=3,
            )


def _rule_names(
    families: Sequence[str], study: str, overrides: Sequence[str], config_dir: str | None
) -> dict[str, list[str]]:
    """Rules to validate, by family: those of the command line, else those that the study sweeps."""
    rest = [text for text in overrides if not text.startswith("policy/")]
    config = compose_config(study, rest, config_dir, with_hydra=True)
    swept, chosen = config.hydra.sweeper.params or {}, config.hydra.runtime.choices
    named = dict(text.split("=", 1) for text in overrides if "=" in text)
    found: dict[str, list[str]] = {}
    for family in families:
        group = f"policy/{family}"
        text = named[group] if group in named else swept.get(group) or chosen[group]
        found[family] = [name.strip() for name in text.split(",")]
    return found


def _show(plan: "Plan", lines: Sequence[Line]) -> None:
    """The table, then its notes."""
    mode = f"{plan.options.profile.value}, {plan.options.device.value}"
    table = grid(
        f"diptych validate -cn {plan.study} ({mode})", "", "simulated", "measured", "error",
        "95 % interval", "accepted", "verdict",
    )  # fmt: skip
    notes: list[str] = []
    last = ""
    for line in lines:
        if line.question != last:
            table.add_row(f"[bold]{line.question}[/]")
        mark = ""
        if line.note:
            notes.append(line.note)
            mark = f" [dim]({len(notes)})[/]"
        colour = COLOURS[line.verdict]
        table.add_row(
            f"  {line.metric}{mark}", line.simulated, line.measured, *_errors(line),
            f"[{colour}]{line.verdict.value}[/]",
        )  # fmt: skip
        last = line.question
    console().print(table)
    for number, note in enumerate(notes, start=1):
        console().print(f"[dim]({number})[/] {note}")


def _errors(line: Line) -> Iterator[str]:
    """Error, interval and acceptance as text."""
    exact = line.accepted is not None and line.accepted < 0.01
    style = "{:.2g}" if exact else "{:.1%}"
    yield "" if line.error is None else style.format(line.error)
    yield "" if line.low is None else f"{style.format(line.low)} - {style.format(line.high)}"
    yield "" if line.accepted is None else style.format(line.accepted)


def _write(
    plan: "Plan", lines: Sequence[Line], runs: "Mapping[str, Runs | PipelineRuns | InstanceRuns]"
) -> None:
    """Write the answers and, of the last policy that was timed, the picture."""
    content = {
        "study": plan.study,
        "options": asdict(plan.options),
        "lines": [asdict(line) for line in lines],
        "provenance": provenance(),
    }
    with whole_folder(plan.out) as building:
        write_json(building / ANSWERS, plain(content))
        if runs:
            _draw(list(runs.values())[-1], building, of_knowledge=plan.knowledge is not None)


def _draw(last: "Runs | PipelineRuns | InstanceRuns", folder: Path, *, of_knowledge: bool) -> None:
    """The pictures of what was timed."""
    from scenarios.elastic_plot import two_timelines
    from scenarios.knowledge_plot import three_requests
    from scenarios.pipeline_plot import two_pipelines
    from scenarios.plots import two_panels
    from scenarios.validation.elastic_both import InstanceRuns
    from scenarios.validation.experts_time import PipelineRuns

    if isinstance(last, InstanceRuns):
        two_timelines(last.simulated, last.measured, last.title, folder / PICTURE)
        return
    if isinstance(last, PipelineRuns):
        two_pipelines(last.simulated, last.measured, last.title, folder / PICTURE)
        return
    two_panels(last.simulated[0], last.measured[0], folder / PICTURE)
    if of_knowledge:
        three_requests(last.simulated[0], last.measured[0], folder / REQUESTS)
