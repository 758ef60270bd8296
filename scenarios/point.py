"""One point of a sweep, in whatever process it runs: composed, simulated, its row written.

Only strings travel to a worker. It finds the user's own policies and parts in the same folders.
"""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from scenarios import rows, sweep_folder
from scenarios.compose import typed
from scenarios.explain import explain
from scenarios.points import Composer, Point
from scenarios.saving import identity, save
from scenarios.study import Save
from sim.result import configuration


@dataclass(frozen=True)
class Job:
    """What all points of a sweep share."""

    study: str
    folders: tuple[str, ...]
    """The user's own, see `scenarios.folders`."""
    root: str
    """Folder of the sweep; absolute."""
    place: str
    """Working directory: relative paths in a study begin there."""
    resume: bool


_composers: dict[Job, Composer] = {}


class Outcome(NamedTuple):
    """What became of a point."""

    point: Point
    status: str
    """done, failed, or kept: taken over from an earlier sweep."""
    notes: tuple[str, ...] = ()
    """What the user should hear of it besides its row."""


def do(job: Job, point: Point) -> Outcome:
    """Simulate one point and write its row; what goes wrong is the row's error."""
    root, chosen = Path(job.root), rows.choices(point)
    row: dict[str, Any] = {"choices": chosen, "identity": None, "configuration": {}}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        row |= _simulated(job, point, row)
    notes = [str(one.message) for one in warned]
    if row.pop("kept", False):
        return Outcome(point, "kept")
    rows.write(root, row)
    return Outcome(point, "failed" if row["error"] else "done", tuple(notes))


def do_elsewhere(job: Job, point: Point) -> Outcome:
    """As `do`, in a process of its own."""
    os.chdir(job.place)
    return do(job, point)


def crashed(job: Job, point: Point, cause: str) -> Outcome:
    """A worker died over a point: its row says so, unless it was written just before."""
    root, chosen = Path(job.root), rows.choices(point)
    if rows.path_of(root, chosen).exists():
        return Outcome(point, "done")
    error = f"{cause}; the same command with resume=true does this point again"
    row = {"choices": chosen, "identity": None, "configuration": {}, "error": error, "figures": {}}
    rows.write(root, row)
    return Outcome(point, "failed")


def _simulated(job: Job, point: Point, row: dict[str, Any]) -> dict[str, Any]:
    root, chosen = Path(job.root), row["choices"]
    found: dict[str, Any] = {"error": "", "figures": {}}
    try:
        study = typed(_composer(job).compose(point))
        scenario, level = study.scenario, study.save or Save.summary
        found["identity"] = identity(scenario)
        found["configuration"] = configuration(scenario)
        if job.resume and _taken(root, chosen, found["identity"], level):
            return found | {"kept": True}
        from scenarios.run import simulate

        result = simulate(scenario, progress=False)
        found["figures"] = rows.figures(result.intervals())
        save(result, root / sweep_folder.POINTS / rows.slug(chosen), level)
    except Exception as error:  # a policy of the user's own may raise anything
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        found |= {"error": f"{kind}{explain(error)}", "figures": {}}
    return found


def _taken(root: Path, chosen: dict[str, str], name: str, level: Save) -> bool:
    try:
        return sweep_folder.take(root, chosen, name, level)
    except rows.Damaged as error:
        warnings.warn(f"{error}; this point is done again", stacklevel=2)
        return False


def remember(job: Job, composer: Composer) -> None:
    """Let the points of a job that run in this process use what was composed already."""
    _composers.clear()
    _composers[job] = composer


def _composer(job: Job) -> Composer:
    if job not in _composers:
        remember(job, Composer(job.study, [Path(folder) for folder in job.folders]))
    return _composers[job]
