# pyright: basic
"""What a run gives back: traces, figures with intervals, and where they come from."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sim import metrics
from sim.scenario import Scenario
from sim.trace import Trace

if TYPE_CHECKING:
    import pandas as pd


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

    def summary(self) -> pd.DataFrame:
        """Mean of every figure and its 95 % interval over the seeds (empty for one seed)."""
        import pandas as pd

        rows = {name: self._interval(name) for name in self.figures[0]}
        return pd.DataFrame.from_dict(rows, orient="index", columns=["mean", "low", "high"])

    def requests(self) -> pd.DataFrame:
        """One row a finished request of the first seed: TTFT and its parts, TPOT, latency."""
        import pandas as pd

        times = metrics.request_times(self.trace)
        parts = metrics.ttft_parts(self.trace, times)
        return pd.DataFrame(
            {
                "request": times.request, "arrival_s": times.arrival_s, "ttft_s": times.ttft_s,
                "queue_s": parts.queue_s, "prefill_s": parts.prefill_s,
                "interference_s": parts.interference_s, "tpot_s": times.tpot_s,
                "e2e_s": times.e2e_s, "output_tokens": times.output_tokens,
                "num_preemptions": times.num_preemptions,
            }
        )  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """Everything but the traces, ready for `json.dump`."""
        intervals = {name: self._interval(name) for name in self.figures[0]}
        return {
            "scenario": plain(asdict(self.scenario)),
            "policies": {
                name: type(getattr(self.scenario.policy, name)).__name__
                for name in ("batching", "instance_plan")
            },
            "seeds": self.scenario.seeds,
            "figures": {name: row[0] for name, row in intervals.items()},
            "intervals_95": {
                name: row[1:] for name, row in intervals.items() if row[1] is not None
            },
            "cost_shares": dict(self.cost_shares),
            "provenance": dict(self.provenance),
        }

    def save(self, folder: Path, *, trace: bool = True) -> Path:
        """Write `summary.json`, `requests.parquet` and, if asked, the trace; whole or not at all.

        Args:
            folder: replaced if it holds a result; refused if it holds anything else.
            trace: also write the four tables of the first seed.

        Raises:
            ValueError: the folder holds something that is not a result.
        """
        if folder.exists() and not (folder / "summary.json").exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no result; name another folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            text = json.dumps(plain(self.as_json()), indent=2, sort_keys=False)
            (building / "summary.json").write_text(text + "\n", encoding="utf-8")
            self.requests().to_parquet(building / "requests.parquet", index=False)
            if trace:
                self.trace.save(building / "trace")
            building.chmod(0o755)
            if folder.exists():
                shutil.rmtree(folder)
            building.rename(folder)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        return folder

    def _interval(self, name: str) -> tuple[float, float | None, float | None]:
        values = np.array([figures[name] for figures in self.figures])
        mean = float(values.mean())
        if len(values) < 2:
            return mean, None, None
        from scipy.stats import t

        half = float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
        return mean, mean - half, mean + half


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
