"""What the command line composes: a scenario, and where its results go."""

from dataclasses import dataclass, fields
from enum import Enum

from sim.scenario import Scenario


class Save(Enum):
    """How much of a result is written. Each level includes those before it."""

    summary = "summary"
    """Figures, intervals, configuration and provenance."""
    requests = "requests"
    """A row of times for every request of the first seed."""
    trace = "trace"
    """All tables of the first seed's trace: what `diptych report` draws."""


@dataclass(kw_only=True)
class Study(Scenario):
    """The Hydra schema of a study."""

    out: str | None = None
    """Folder of the results; null: runs/<name>/<digest of the configuration>."""
    save: Save | None = None
    """What is written; null: trace for a run, summary for the points of a sweep."""
    resume: bool = False
    """Keep the points that an interrupted sweep has finished, and do the rest."""

    @property
    def scenario(self) -> Scenario:
        """The study without what only the command line needs."""
        return Scenario(**{field.name: getattr(self, field.name) for field in fields(Scenario)})
