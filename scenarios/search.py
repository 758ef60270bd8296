"""`diptych search`: the best configuration of a study's space, such as the cheapest within the SLO.

Optuna's own API, because `hydra-optuna-sweeper` needs Optuna below 3, knows neither constraints
nor a space that is tried in full, and keeps its trials apart from the tables of sweeps. A trial is
a point of a sweep: it runs on any launcher, is a row of the same table, and is resumed likewise.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hardware_models.names import alternatives
from hardware_models.parts import load_gpu
from scenarios import rows, sweep_folder, sweep_table, tables
from scenarios.compose import parse, refuse_flags
from scenarios.explain import explain
from scenarios.launchers.base import Run
from scenarios.launchers.extras import require_optuna
from scenarios.points import Point
from scenarios.progress import Telling
from scenarios.search_space import axis, in_hydras_words
from scenarios.study import Search, Within
from scenarios.sweep import Plan, base, go, keep_nothing, settle
from scenarios.trials import Trials
from sim.api import run as run_scenario
from sim.files import write_json
from sim.metrics import Slo
from sim.result import plain
from sim.scenario import Model, Scenario
from sim.workload.poisson import Poisson

INFEASIBLE = "infeasible"
"""Column of a search's table: why a configuration is out of the question, or nothing."""


def main(argv: Sequence[str]) -> int:
    """Search the space of a study; 0 if a configuration is feasible, else 1.

    Raises:
        ValueError: the study has nothing to search, or is refused; nothing is written then.
    """
    command = parse(argv)
    refuse_flags(command, "search")
    if command.study is None:
        from scenarios.listing import show_studies

        show_studies(command.config_dir, "search")
        return 2 if command.overrides else 0
    config = base(command)
    search = _search_of(config, command.study)
    require_optuna()
    _require_figure(search.minimise)
    plan = settle(command, config, in_hydras_words(search.space), axis)
    trials = Trials(search)
    total = int(min(search.num_trials, plan.space.size))
    code = go(plan, lambda run: _try_all(plan, trials, run, total))
    return code or _finish(plan, trials)


def _try_all(plan: Plan, trials: Trials, run: Run, total: int) -> None:
    with Telling(plan.job.study, total) as telling:

        def run_batch(points: list[Point]) -> Mapping[Point, rows.Row]:
            for outcome in run(points):
                telling.tell(outcome)
            return {point: _row(plan, point) for point in points}

        trials.run(plan.space, run_batch)


def _row(plan: Plan, point: Point) -> rows.Row:
    return rows.read_one(rows.path_of(plan.root, rows.choices(point)))


def _search_of(config: Any, study: str) -> Search:
    """What a study searches.

    Raises:
        ValueError: it searches nothing, or not in a way that can be.
    """
    if config.search is None:
        raise ValueError(
            f"study {study} has nothing to search; add `search:` with a `space:` to it, or sweep "
            "it with `diptych run -m`"
        )
    try:
        search: Any = OmegaConf.to_object(config.search)
        slo: Any = OmegaConf.to_object(config.slo)
    except OmegaConfBaseException as error:
        raise ValueError(explain(error)) from error
    if search.within is Within.slo and slo == Slo():
        raise ValueError(
            "search.within=slo and the study demands nothing; give slo.ttft_s, slo.tpot_s or "
            "slo.e2e_s"
        )
    return search


def _require_figure(name: str) -> None:
    """Refuse a figure that no result has, before anything runs.

    Raises:
        ValueError: there is no such figure; the message lists them.
    """
    load = Poisson(rate_per_s=1.0, num_requests=2, input_tokens=8, output_tokens=2)
    smallest = Scenario(model=Model(name="tiny_llama"), gpu=load_gpu("l40s"), workload=load)
    known = list(run_scenario(smallest).figures[0])
    if name not in known:
        raise ValueError(f"search.minimise={name} is not a figure; {alternatives(name, known)}")


def _finish(plan: Plan, trials: Trials) -> int:
    """Write the table and the answer, and show both."""
    found = sorted((_row(plan, point) for point in trials.judged), key=rows.order)
    if all(row["error"] for row in found):
        rows.show(found)
        keep_nothing(plan.root)
        return 1
    why = {rows.label(rows.choices(p)): one.infeasible for p, one in trials.judged.items()}
    reasons = [why[rows.label(row["choices"])] for row in found]
    sweep_table.write(found, plan.root, {INFEASIBLE: reasons})
    write_json(plan.root / sweep_folder.SEARCH, _as_json(plan, trials))
    sweep_folder.settle(plan.root, found)
    search = trials.search
    rows.show(found, {search.minimise: tables.heading(search.minimise)})
    _show_best(plan, trials)
    tables.console().print(f"saved in {plan.root}", soft_wrap=True)
    return 0 if trials.best() else 1


def _show_best(plan: Plan, trials: Trials) -> None:
    search, best, out = trials.search, trials.best(), tables.console()
    num = len(trials.judged)
    refused = sum(bool(_row(plan, point)["error"]) for point in trials.judged)
    feasible = sum(not one.infeasible for one in trials.judged.values())
    how = "all that there are" if plan.space.size == num else f"of {_size(plan)}"
    out.print(
        f"{num} configurations tried ({how}): {feasible} within the SLO, "
        f"{num - feasible - refused} not, {refused} refused"
    )
    if best is None:
        near = trials.nearest()
        out.print("none is feasible; the nearest:", style="bold red")
        out.print(f"  {_varying(plan, near)}: {trials.judged[near].infeasible}", markup=False)
        return
    value = tables.quantity(search.minimise, trials.judged[best].value)
    met = _row(plan, best)["figures"]["slo_share"]
    out.print(
        f"best: {_varying(plan, best)}: {search.minimise} {value}, {met:.2%} of the requests met "
        "the SLO",
        style="bold", markup=False, soft_wrap=True,
    )  # fmt: skip


def _size(plan: Plan) -> str:
    return f"{plan.space.size:,.0f}" if plan.space.size < 1e15 else "infinitely many"


def _varying(plan: Plan, point: Point) -> str:
    """What a configuration chose where there was a choice."""
    axes = zip(plan.space.axes.values(), point, strict=True)
    return " ".join(line for one, line in axes if not isinstance(one, list) or len(one) > 1)


def _as_json(plan: Plan, trials: Trials) -> dict[str, Any]:
    best = trials.best()
    return plain(
        {
            "search": vars(trials.search),
            "num_trials": len(trials.judged),
            "num_feasible": sum(not one.infeasible for one in trials.judged.values()),
            "best": None if best is None else {
                "choices": rows.choices(best), "value": trials.judged[best].value
            },
            "trials": [
                {"choices": rows.choices(point), "infeasible": one.infeasible}
                for point, one in trials.judged.items()
            ],
        }
    )  # fmt: skip
