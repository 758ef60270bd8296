"""`diptych run`: simulate a study, print its figures, save its result."""

from collections.abc import Sequence
from pathlib import Path

from scenarios import tables
from scenarios.compose import compose_study, parse
from scenarios.saving import default_folder, save
from scenarios.study import Save, Study
from sim.api import run
from sim.elastic_setup import is_elastic
from sim.result import Result, kind, require_result_folder
from sim.scenario import Scenario


def main(argv: Sequence[str]) -> int:
    """Run a study; with `-m`, every point of its sweep.

    Raises:
        ValueError: the study is refused, before anything is written.
    """
    command = parse(argv)
    if command.flags:
        from scenarios.ask_hydra import ask_hydra

        return ask_hydra(command)
    if command.study is None:
        from scenarios.listing import show_studies

        show_studies(command.config_dir, "run")
        return 2 if command.overrides or command.multirun else 0
    if command.multirun:
        from scenarios.sweep import sweep

        return sweep(command)
    study = compose_study(command.study, command.overrides, command.config_dir)
    _run_one(command.study, study)
    return 0


def simulate(scenario: Scenario, *, progress: bool = True) -> Result:
    """As `sim.api.run`, telling on a terminal which seed is at work.

    Raises:
        ValueError: the scenario cannot run; see `sim.api.check`.
    """
    if not progress:
        return run(scenario)
    with tables.console(errors=True).status(f"{scenario.name}: reading the workload") as status:

        def tell(seed: int) -> None:
            place = f"{scenario.seeds.index(seed) + 1} of {len(scenario.seeds)}"
            status.update(f"{scenario.name}: seed {seed} ({place})")

        return run(scenario, tell)


def show(result: Result) -> None:
    """Print a result: what ran, its figures, what its costs rest on."""
    scenario, figures = result.scenario, result.intervals()
    machine = scenario.node or scenario.gpu or scenario.cluster
    rules = ", ".join(kind(rule) for rule in vars(scenario.policy).values())
    if is_elastic(scenario):  # which asks no other
        rules = kind(scenario.policy.instance_plan)
    counted = tables.number(figures["counted_requests"].mean)
    out = tables.console()
    out.print(
        f"[bold]{scenario.name}[/]: {scenario.model.name} on {machine.name if machine else '-'}, "
        f"{kind(scenario.workload)}, {rules}"
    )
    out.print(
        f"{tables.number(figures['num_requests'].mean)} requests, {counted} of them in the steady "
        f"window, {len(scenario.seeds)} seed{'s' if len(scenario.seeds) > 1 else ''}"
        + (" (± half of the 95 % interval)" if len(scenario.seeds) > 1 else "")
    )
    num_overloaded = int(sum(one["overloaded"] for one in result.figures))
    reason = tables.overload_reason(num_overloaded, len(scenario.seeds))
    tables.show_result(figures, reason, result.cost_shares)


def _run_one(name: str, study: Study) -> None:
    scenario = study.scenario
    folder = Path(study.out) if study.out else default_folder(name, scenario)
    require_result_folder(folder)
    result = simulate(scenario)
    save(result, folder, study.save or Save.trace)
    show(result)
    tables.console().print(f"saved in {folder}", soft_wrap=True)
