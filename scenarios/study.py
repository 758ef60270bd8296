"""What the command line composes: a scenario, and where its results go."""

from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from sim.scenario import Scenario


class Save(Enum):
    """How much of a result is written. Each level includes those before it."""

    summary = "summary"
    """Figures, intervals, configuration and provenance."""
    requests = "requests"
    """A row of times for every request of the first seed."""
    trace = "trace"
    """All tables of the first seed's trace: what `diptych report` draws."""


class Within(Enum):
    """What makes a configuration feasible."""

    slo = "slo"
    """No overload, and `met_share` of the requests meet the study's SLO."""


@dataclass(kw_only=True)
class Search:
    """What `diptych search` looks for."""

    space: dict[str, Any]
    """Key of an override -> its values: a list, or a sweep in Hydra's words (`range(1,9)`,
    `interval(0.1,1)`, `tag(log,interval(16,1024))`)."""
    minimise: str = "usd_per_hour"
    """A figure of a result."""
    within: Within = Within.slo
    """What a configuration must keep."""
    met_share: float = 0.99
    """Share of the requests that must meet the SLO."""
    num_trials: int = 40
    """Configurations to try; a space with no more is tried in full."""
    batch: int = 4
    """Trials chosen at a time, and run in parallel where the launcher can. Part of the search, not
    of the launcher: the same search tries the same configurations on any."""
    seed: int = 0
    """Of the choice of trials."""

    def __post_init__(self) -> None:
        if not self.space:
            raise ValueError("search.space is empty; name keys and values, as gpu: [l40s, h20]")
        if not 0 < self.met_share <= 1:
            raise ValueError(f"search.met_share={self.met_share} must be above 0 and at most 1")
        for name in ("num_trials", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"search.{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"search.seed={self.seed} must be at least 0 and below 2^32")


@dataclass(kw_only=True)
class Study(Scenario):
    """The Hydra schema of a study."""

    out: str | None = None
    """Folder of the results; null: runs/<name>/<digest of the configuration>."""
    save: Save | None = None
    """What is written; null: trace for a run, summary for the points of a sweep."""
    resume: bool = False
    """Keep the points that an interrupted sweep has finished, and do the rest."""

    search: Search | None = None
    """What `diptych search` looks for; null: nothing."""

    @property
    def scenario(self) -> Scenario:
        """The study without what only the command line needs."""
        return Scenario(**{field.name: getattr(self, field.name) for field in fields(Scenario)})
