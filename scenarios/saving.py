"""Where the command line puts results, and how a configuration names them."""

import hashlib
import json
from pathlib import Path

from scenarios.study import Save
from sim.provenance import commit
from sim.result import Result, configuration
from sim.scenario import Scenario


def digest(value: object) -> str:
    """Ten hexadecimal digits that name a value; the same in every process."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def identity(scenario: Scenario) -> str:
    """What must be the same for a figure to be the same: configuration, code and data.

    The module of a user's file is named by path and time of change, see `registry.load_file`.
    """
    loads = [scenario.workload, scenario.token_routing]
    modules = [type(rule).__module__ for rule in (*loads, *vars(scenario.policy).values())]
    data = [_file_digest(getattr(load, "path", None)) for load in loads]
    return digest([configuration(scenario), commit(), modules, data])


def _file_digest(name: str | None) -> str:
    path = Path(name).expanduser() if name else None
    if path is None or not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def default_folder(study: str, scenario: Scenario) -> Path:
    """Where a run's results go unless `out` says otherwise."""
    return Path("runs") / study / digest(configuration(scenario))


def save(result: Result, folder: Path, level: Save) -> Path:
    """Write as much of a result as the level says; see `Result.save`."""
    return result.save(folder, requests=level is not Save.summary, trace=level is Save.trace)
