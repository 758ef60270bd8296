"""Where the command line puts results, and how a configuration names them."""

import json
from hashlib import sha256
from pathlib import Path

from scenarios.study import Save
from sim.result import Result, configuration
from sim.scenario import Scenario


def digest(value: object) -> str:
    """Ten hexadecimal digits that name a value; the same in every process."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return sha256(text.encode()).hexdigest()[:10]


def default_folder(study: str, scenario: Scenario) -> Path:
    """Where a run's results go unless `out` says otherwise."""
    return Path("runs") / study / digest(configuration(scenario))


def save(result: Result, folder: Path, level: Save) -> Path:
    """Write as much of a result as the level says; see `Result.save`."""
    return result.save(folder, requests=level is not Save.summary, trace=level is Save.trace)
