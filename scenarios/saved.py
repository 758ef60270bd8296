"""Reads results back: what `report` and `compare` work on."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sim.result import SUMMARY, Figure
from sim.trace import Trace
from sim.trace_files import load_trace


@dataclass(frozen=True)
class Saved:
    """A result on disk."""

    folder: Path
    summary: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.folder.resolve().name

    @property
    def configuration(self) -> Mapping[str, Any]:
        """The scenario that it is the result of."""
        return self.summary["scenario"]

    @property
    def num_seeds(self) -> int:
        """How many runs its figures are the mean of."""
        return len(self.summary["seeds"])

    @property
    def figures(self) -> dict[str, Figure]:
        """Mean and half-width of the interval; null in the file is not a number here."""
        halves = {
            name: (high - low) / 2
            for name, (low, high) in self.summary["intervals_95"].items()
            if low is not None and high is not None
        }
        return {
            name: Figure(float("nan") if mean is None else mean, halves.get(name))
            for name, mean in self.summary["figures"].items()
        }

    @property
    def seed_figures(self) -> dict[str, list[float]]:
        """Every figure of each run, in order of the seeds; null in the file is not a number."""
        return {
            name: [float("nan") if value is None else value for value in values]
            for name, values in self.summary["seed_figures"].items()
        }

    def saw_the_requests_of(self, other: "Saved") -> bool:
        """Whether the runs of both results saw the same requests, seed by seed."""
        keys = ("workload", "workload_kind", "seeds")
        mine, theirs = self.configuration, other.configuration
        return all(mine[key] == theirs[key] for key in keys)

    def trace(self) -> Trace:
        """The trace of its first seed.

        Raises:
            ValueError: it was saved without one, or the trace is damaged.
        """
        folder = self.folder / "trace"
        if not folder.is_dir():
            raise ValueError(f"{self.folder} holds no trace; run the study again with save=trace")
        return load_trace(folder)


def load(path: Path) -> Saved:
    """A result by its folder or by its summary.json.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    folder = path.parent if path.name == SUMMARY else path
    file = folder / SUMMARY
    if not file.is_file():
        raise ValueError(
            f"{path} holds no {SUMMARY}; name a folder that `diptych run` wrote, such as one below "
            "runs/"
        )
    try:
        summary: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}); run the study again") from error
    needed = {"scenario", "seeds", "figures", "intervals_95", "seed_figures", "cost_shares",
              "overloaded_seeds"}  # fmt: skip
    if not isinstance(summary, dict) or not needed <= summary.keys():
        raise ValueError(f"{file} is not the summary of a run; run the study again")
    return Saved(folder, summary)
