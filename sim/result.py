# pyright: basic
"""What a run gives back: traces, figures with intervals, and where they come from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sim import files, metrics
from sim.scenario import Scenario
from sim.trace import Array, Trace

if TYPE_CHECKING:
    import pandas as pd


SUMMARY = "summary.json"
"""The file that makes a folder a result."""
FILES = (
    SUMMARY, "requests.parquet", "trace/*.parquet",
    "timeline.png", "latency.png", "trace.perfetto.json",
)  # fmt: skip
"""What a result's folder may hold: what a run writes, and what a report adds."""


class Figure(NamedTuple):
    """A figure over the seeds."""

    mean: float
    half: float | None
    """Half of its 95 % interval (Student's t); None for a single seed."""


@dataclass(frozen=True)
class Result:
    """A simulated scenario. One trace and one dictionary of figures a seed."""

    scenario: Scenario
    traces: tuple[Trace, ...]
    figures: tuple[Mapping[str, float], ...]
    """As `summary.summarise` gives them, in order of `scenario.seeds`."""
    provenance: Mapping[str, str]
    """Commit, versions, machine."""
    cost_shares: Mapping[str, float]
    """Share of the simulated time by where its costs come from; adds up to 1."""

    @property
    def trace(self) -> Trace:
        """The trace of the first seed."""
        return self.traces[0]

    def __getitem__(self, figure: str) -> float:
        """Mean of one figure over the seeds.

        Raises:
            KeyError: there is no such figure; the message lists them.
        """
        if figure not in self.figures[0]:
            raise KeyError(f"figure {figure!r} is not in a result; there are: "
                           f"{', '.join(self.figures[0])}")  # fmt: skip
        return float(np.mean([figures[figure] for figures in self.figures]))

    def intervals(self) -> dict[str, Figure]:
        """Every figure's mean over the seeds, with its interval."""
        return {name: interval([row[name] for row in self.figures]) for name in self.figures[0]}

    def summary(self) -> pd.DataFrame:
        """Mean of every figure and its 95 % interval over the seeds (empty for one seed)."""
        import pandas as pd

        rows = {name: (f.mean, *_bounds(f)) for name, f in self.intervals().items()}
        return pd.DataFrame.from_dict(rows, orient="index", columns=["mean", "low", "high"])

    def requests(self) -> pd.DataFrame:
        """One row a finished request of the first seed: TTFT and its parts, TPOT, latency."""
        import pandas as pd

        return pd.DataFrame(self._request_columns())

    def _request_columns(self) -> dict[str, Array]:
        times = metrics.request_times(self.trace)
        parts = metrics.ttft_parts(self.trace, times)
        return {
            "request": times.request,
            "arrival_s": times.arrival_s,
            "ttft_s": times.ttft_s,
            "search_s": parts.search_s,
            "queue_s": parts.queue_s,
            "prefill_s": parts.prefill_s,
            "interference_s": parts.interference_s,
            "tpot_s": times.tpot_s,
            "e2e_s": times.e2e_s,
            "output_tokens": times.output_tokens,
            "num_preemptions": times.num_preemptions,
        }

    def as_json(self) -> dict[str, Any]:
        """What `summary.json` holds: all but the traces, in JSON's types."""
        found = self.intervals()
        return plain(
            {
                "scenario": configuration(self.scenario),
                "seeds": self.scenario.seeds,
                "figures": {name: figure.mean for name, figure in found.items()},
                "intervals_95": {n: _bounds(f) for n, f in found.items() if f.half is not None},
                "seed_figures": {n: [row[n] for row in self.figures] for n in found},
                "overloaded_seeds": int(sum(row["overloaded"] for row in self.figures)),
                "cost_shares": dict(self.cost_shares),
                "provenance": dict(self.provenance),
            }
        )

    def save(self, folder: Path, *, requests: bool = True, trace: bool = True) -> Path:
        """Write the result into a folder that appears complete or not at all.

        Args:
            folder: replaced if it holds a result; `summary.json` is always written.
            requests: also `requests.parquet`, a row a request of the first seed.
            trace: also `trace/`, the tables of the first seed.

        Raises:
            ValueError: the folder holds something that is not a result.
        """
        require_result_folder(folder)
        with files.whole_folder(folder) as building:
            files.write_json(building / SUMMARY, self.as_json())
            if requests:
                from sim.trace_files import write_columns

                write_columns(self._request_columns(), building / "requests.parquet")
            if trace:
                self.trace.save(building / "trace")
        return folder


def interval(values: list[float]) -> Figure:
    """Mean and half-width of its 95 % interval."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Figure(mean, None)
    # All of scipy.stats takes a second to import; this is the function behind its t.ppf.
    from scipy.special import stdtrit

    quantile = float(stdtrit(len(values) - 1, 0.975))
    return Figure(mean, quantile * float(np.std(values, ddof=1)) / len(values) ** 0.5)


def _bounds(figure: Figure) -> tuple[float | None, float | None]:
    if figure.half is None:
        return None, None
    return figure.mean - figure.half, figure.mean + figure.half


def configuration(scenario: Scenario) -> dict[str, Any]:
    """Everything that decides a run, in JSON's types."""
    return {
        **plain(asdict(scenario)),
        "workload_kind": kind(scenario.workload),
        "token_routing_kind": kind(scenario.token_routing),
        "policy_kinds": {name: kind(rule) for name, rule in sorted(vars(scenario.policy).items())},
    }


def kind(record: object) -> str:
    """What a record is, spelt like the file that defines it: chunked_prefill."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(record).__name__).lower()


def require_result_folder(folder: Path) -> None:
    """Refuse a folder where anything but an earlier result is.

    Raises:
        ValueError: it cannot be written, or the folder holds anything else.
    """
    files.claim_folder(folder, FILES, "result")


def plain(value: Any) -> Any:
    """`value` in JSON's types: enums by name, numbers that are not finite as null."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
