"""`diptych validate`: run both panels, answer the four questions, draw the diptych.

Exit code 0 unless a line missed (1) or the command was refused (2).
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from scenarios import calibrate
from scenarios.compose import compose_config, parse, studies, typed
from scenarios.tables import console, grid
from scenarios.validation.options import Fault, Options, Question, split, with_short_chunks
from scenarios.validation.verdict import Line, Verdict
from sim.files import write_json
from sim.policies.batching.base import Batching
from sim.provenance import provenance
from sim.result import plain

if TYPE_CHECKING:
    from rich.progress import Progress

    from backends.transformer import Transformer
    from scenarios.validation.timing import Runs

COLOURS = {
    Verdict.passed: "green", Verdict.missed: "bold red", Verdict.too_noisy: "yellow",
    Verdict.not_run: "dim", Verdict.reported: "dim",
}  # fmt: skip


class Plan(NamedTuple):
    """What a validation will run."""

    study: str
    options: Options
    policies: dict[str, Batching]
    """Each with a token budget that cuts the short prompts of the validation."""
    accept: dict[str, float]
    out: Path


def main(argv: Sequence[str]) -> int:
    """Validate a study; print the table; write validation.json and timeline.png."""
    plan = _plan(argv)
    if plan is None:
        return 2
    lines, picture = _answer(plan)
    _show(plan, lines)
    _write(plan, lines)
    console().print(f"written to {plan.out}: validation.json" + (", timeline.png" * bool(picture)))
    return int(any(line.verdict is Verdict.missed for line in lines))


def _plan(argv: Sequence[str]) -> Plan | None:
    command = parse(argv)
    if command.study is None:
        table = grid("Studies: diptych validate -cn STUDY", "study", "question", left=2)
        for name, question in studies(command.config_dir).items():
            table.add_row(name, question)
        console().print(table)
        return None
    options, overrides = split(command.overrides)
    names = _policy_names(command.study, overrides, command.config_dir)
    rest = [text for text in overrides if not text.startswith("policy/batching=")]
    policies: dict[str, Batching] = {}
    accept: dict[str, float] = {}
    for name in names:
        chosen = [*rest, f"policy/batching={name}"]
        study = typed(compose_config(command.study, chosen, command.config_dir))
        policies[name] = with_short_chunks(study.policy.batching)
        accept = dict(study.accept)
    out = Path(options.out or Path("runs") / command.study / "validation")
    return Plan(command.study, options, policies, accept, out)


def _policy_names(study: str, overrides: Sequence[str], config_dir: str | None) -> list[str]:
    """Rules to validate: those of the command line, else those that the study sweeps."""
    for text in reversed(overrides):
        if text.startswith("policy/batching="):
            return text.partition("=")[2].split(",")
    config = compose_config(study, overrides, config_dir, with_hydra=True)
    swept = (config.hydra.sweeper.params or {}).get("policy/batching")
    if swept:
        return [name.strip() for name in swept.split(",")]
    return [config.hydra.runtime.choices["policy/batching"]]


def _answer(plan: Plan) -> tuple[list[Line], bool]:
    """Ask the four questions in order; says whether a picture was drawn into the out folder."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from backends.serving import open_model, use_one_thread

    use_one_thread()
    device = plan.options.device.value
    asked = set(plan.options.only)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    lines: list[Line] = []
    with Progress(*columns, console=console(errors=True), transient=True) as progress:
        if asked & {Question.decisions, Question.bytes}:
            _, tiny = open_model("random", device)
            lines += _decisions_and_bytes(plan, tiny, asked, progress)
    runs = None
    if asked & {Question.numbers, Question.time}:
        fit = _fit(plan) if Question.time in asked else None
        with Progress(*columns, console=console(errors=True), transient=True) as progress:
            task = progress.add_task("loading the model", total=None)
            model, transformer = open_model(
                plan.options.weights, device, lambda text: progress.update(task, description=text)
            )
            progress.remove_task(task)
            if Question.numbers in asked:
                lines += _numbers(plan, transformer, model.folder, progress)
            if fit is not None:
                runs, timing = _time(plan, transformer, fit, progress)
                lines += timing
    for question in Question:
        if question not in asked:
            lines.append(_not_run(question, "left out by only=..."))
    order = [question.value for question in Question]
    lines.sort(key=lambda line: order.index(line.question))
    return lines, _draw(plan, runs)


def _decisions_and_bytes(
    plan: Plan, tiny: "Transformer", asked: set[Question], progress: "Progress"
) -> list[Line]:
    from backends.kv_cache import Corruption
    from scenarios.validation.decisions import exact_lines

    count = plan.options.sizes.decision_requests
    fault = plan.options.corrupt
    lines: list[Line] = []
    task = progress.add_task("decisions and bytes", total=len(plan.policies))
    for name, batching in plan.policies.items():
        # In mid-run, so that the fault meets a full pool.
        corruption = None
        if fault is Fault.skip_free:
            corruption = Corruption(kind="skip_free", index=count // 2)
        elif fault is Fault.drop_copy:
            corruption = Corruption(kind="drop_copy", index=count * 20)
        found = exact_lines(name, tiny, batching, count, plan.options.seed, corruption)
        lines += [line for line in found if Question(line.question) in asked]
        progress.advance(task)
    return lines


def _numbers(
    plan: Plan, transformer: "Transformer", folder: Path | None, progress: "Progress"
) -> list[Line]:
    from backends.reference import Reference
    from scenarios.validation.numbers import compare, number_lines

    if folder is None:
        return [_not_run(Question.numbers, f"weights={plan.options.weights} has no reference")]
    sizes = plan.options.sizes
    reference = Reference(folder, plan.options.device.value)
    lines: list[Line] = []
    task = progress.add_task("numbers", total=len(plan.policies))
    for name, batching in plan.policies.items():
        found = compare(transformer, folder, reference, batching, sizes.prompts, sizes.new_tokens)
        lines += number_lines(name, found, sizes.prompts)
        progress.advance(task)
    return lines


def _fit(plan: Plan):
    """The stored calibration of this machine, or a new one."""
    path = calibrate.node_path(plan.options.calibration)
    device = plan.options.device.value
    fit = calibrate.stored(path, plan.options.weights, device)
    if fit is None:
        console(errors=True).print(f"no calibration of this machine in {path}: calibrating first")
        calibrate.calibrate(plan.options.weights, device, calibrate.Options().repeats, path)
        fit = calibrate.stored(path, plan.options.weights, device)
        assert fit is not None
    return fit


def _time(
    plan: Plan, transformer: "Transformer", fit, progress: "Progress"
) -> tuple["Runs", list[Line]]:
    from backends.serving import serve
    from scenarios.validation import timing
    from sim.costs.fitted import Fitted
    from sim.workload.source import Source

    cost, sizes, seed = Fitted(fit), plan.options.sizes, plan.options.seed
    rate = plan.options.load * timing.capacity_per_s(cost)
    requests = timing.workload(rate, sizes.time_requests)
    runs = timing.Runs({name: [] for name in plan.policies})
    task = progress.add_task("time", total=sizes.repeats * len(plan.policies))
    for repeat in range(sizes.repeats):  # variants interleaved: A B C A B C
        for name, batching in plan.policies.items():
            again = Source(requests, seed + repeat, timing.CONTEXT)
            measured = serve(transformer, again, batching, timing.LIMITS, seed=seed + repeat).trace
            again = Source(requests, seed + repeat, timing.CONTEXT)
            simulated = timing.predict(again, batching, cost)
            runs.by_policy[name].append(timing.Run(simulated, measured))
            progress.advance(task)
    return runs, timing.time_lines(runs, cost, plan.accept, seed)


def _draw(plan: Plan, runs: "Runs | None") -> bool:
    """The two-panel timeline of the first timed run of the last policy."""
    if runs is None:
        return False
    from scenarios.plots import two_panels

    name, repeats = list(runs.by_policy.items())[-1]
    plan.out.mkdir(parents=True, exist_ok=True)
    two_panels(repeats[0].simulated, repeats[0].measured, plan.out / "timeline.png")
    return bool(name)


def _not_run(question: Question, why: str) -> Line:
    return Line(
        question=question.value, metric="", simulated="", measured="", error=None,
        verdict=Verdict.not_run, note=why,
    )  # fmt: skip


def _show(plan: Plan, lines: Sequence[Line]) -> None:
    title = f"diptych validate -cn {plan.study} ({plan.options.profile.value}, "
    title += f"{plan.options.device.value})"
    table = grid(
        title, "question", "comparison", "simulated", "measured", "error", "95 % interval",
        "accepted", "verdict", left=2,
    )  # fmt: skip
    last = ""
    for line in lines:
        colour = COLOURS[line.verdict]
        table.add_row(
            line.question if line.question != last else "", line.metric, line.simulated,
            line.measured, *_errors(line), f"[{colour}]{line.verdict.value}[/]",
        )  # fmt: skip
        if line.note:
            table.add_row("", f"[dim]  {line.note}[/]", "", "", "", "", "", "")
        last = line.question
    console().print(table)


def _errors(line: Line) -> Iterator[str]:
    """Error, interval and acceptance as text."""
    exact = line.accepted == 0 or (line.accepted or 1) < 0.01
    style = "{:.4g}" if exact else "{:.1%}"
    yield "" if line.error is None else style.format(line.error)
    yield "" if line.low is None else f"{style.format(line.low)} to {style.format(line.high)}"
    yield "" if line.accepted is None else style.format(line.accepted)


def _write(plan: Plan, lines: Sequence[Line]) -> None:
    """Write validation.json."""
    content = {
        "study": plan.study,
        "options": asdict(plan.options),
        "lines": [asdict(line) for line in lines],
        "provenance": provenance(),
    }
    write_json(plan.out / "validation.json", plain(content))
