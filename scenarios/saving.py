"""Results on disk: one folder a run, whole or absent, named after its configuration."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scenarios.study import Save
from sim.result import Result, plain
from sim.scenario import Scenario

SUMMARY = "summary.json"


class Figure(NamedTuple):
    """A figure over the seeds."""

    mean: float
    half: float | None
    """Half of its 95 % interval; None for a single seed."""


def configuration(scenario: Scenario) -> dict[str, Any]:
    """Everything that decides a run, in JSON's types."""
    return {
        **plain(asdict(scenario)),
        "workload_kind": kind(scenario.workload),
        "policy_kinds": {name: kind(rule) for name, rule in sorted(vars(scenario.policy).items())},
    }


def kind(record: object) -> str:
    """What a record is, spelt like the file that defines it: chunked_prefill."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(record).__name__).lower()


def digest(value: object) -> str:
    """Ten hexadecimal digits that name a value; the same in every process."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return sha256(text.encode()).hexdigest()[:10]


def default_folder(study: str, scenario: Scenario) -> Path:
    """Where a run's results go unless `out` says otherwise."""
    return Path("runs") / study / digest(configuration(scenario))


def figures_of(result: Result) -> dict[str, Figure]:
    """Mean of every figure over the seeds, with its 95 % interval."""
    return {
        name: interval([figures[name] for figures in result.figures]) for name in result.figures[0]
    }


def interval(values: list[float]) -> Figure:
    """Mean and half-width of its 95 % interval (Student's t)."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Figure(mean, None)
    # The whole of scipy.stats takes a second to import; this is the function behind its t.ppf.
    from scipy.special import stdtrit

    quantile = stdtrit(len(values) - 1, 0.975)
    return Figure(mean, float(quantile * np.std(values, ddof=1) / np.sqrt(len(values))))


def summary_of(result: Result) -> dict[str, Any]:
    """What `summary.json` holds: configuration, figures, intervals, costs, provenance."""
    summary = replace(result, figures=result.figures[:1]).as_json()
    found = figures_of(result)
    summary |= {
        "scenario": configuration(result.scenario),
        "figures": {name: figure.mean for name, figure in found.items()},
        "intervals_95": {
            name: [figure.mean - figure.half, figure.mean + figure.half]
            for name, figure in found.items()
            if figure.half is not None
        },
        "overloaded_seeds": int(sum(figures["overloaded"] for figures in result.figures)),
    }
    return plain(summary)


def require_result_folder(folder: Path) -> None:
    """Refuse to write over something that is not a result.

    Raises:
        ValueError: the folder is a file, or holds anything but a result.
    """
    if folder.is_file():
        raise ValueError(f"out={folder} is a file and must be a folder; name another one")
    if folder.exists() and not (folder / SUMMARY).exists() and any(folder.iterdir()):
        raise ValueError(
            f"out={folder} is not empty and holds no result; name another folder or empty it"
        )


def save(result: Result, folder: Path, level: Save) -> Path:
    """Write a result into a folder that appears complete or not at all.

    Args:
        result: what to write.
        folder: replaced if it holds a result.
        level: how much to write.

    Raises:
        ValueError: the folder holds something that is not a result.
    """
    require_result_folder(folder)
    with whole_folder(folder) as building:
        write_json(building / SUMMARY, summary_of(result))
        if level is not Save.summary:
            result.requests().to_parquet(building / "requests.parquet", index=False)
        if level is Save.trace:
            result.trace.save(building / "trace")
    return folder


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill; it takes its name when all is written, and vanishes when that fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield building
        building.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        building.rename(folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write; it takes its name when all is written, and vanishes when that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON, complete or not at all."""
    with whole_file(path) as building:
        building.write_text(json.dumps(plain(value), indent=2) + "\n", encoding="utf-8")
