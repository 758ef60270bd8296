"""Which configurations a search tries, and which of them it finds best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from scenarios import rows
from scenarios.points import Point
from scenarios.search_space import Space
from scenarios.study import Search

if TYPE_CHECKING:
    from optuna.trial import Trial

REFUSED, OVERLOADED = 2.0, 1.0
"""How far outside a configuration is that cannot run or has no steady state, added to its lack."""


class RunBatch(Protocol):
    """Runs points; the row of each."""

    def __call__(self, points: list[Point]) -> Mapping[Point, rows.Row]:
        """Every point once."""
        ...


@dataclass(frozen=True)
class Judgement:
    """What a search makes of a configuration."""

    value: float
    """Of the figure to minimise; 0 where there is none."""
    violation: float
    """How far it is outside; 0 or less: feasible."""
    infeasible: str
    """Why, or nothing."""


@dataclass
class Trials:
    """Every configuration that was tried, in order."""

    search: Search
    judged: dict[Point, Judgement] = field(default_factory=dict[Point, Judgement])

    def best(self) -> Point | None:
        """The feasible configuration of the least value; of equals the one furthest inside."""
        feasible = [
            (one.value, one.violation, point)
            for point, one in self.judged.items()
            if not one.infeasible
        ]
        return min(feasible)[2] if feasible else None

    def nearest(self) -> Point:
        """The configuration that is least outside."""
        return min(self.judged, key=lambda point: (self.judged[point].violation, point))

    def run(self, space: Space, run_batch: RunBatch) -> None:
        """Try the whole space where `num_trials` allows, else what Optuna's TPE suggests."""
        if space.size <= self.search.num_trials:
            points = space.every()
            for point, row in run_batch(points).items():
                self.judged[point] = judge(row, self.search)
            return
        for batch in self._suggested(space):
            fresh = list(dict.fromkeys(point for point in batch if point not in self.judged))
            for point, row in run_batch(fresh).items():
                self.judged[point] = judge(row, self.search)

    def _suggested(self, space: Space) -> Iterator[list[Point]]:
        """Batches of suggestions. After each, its points must have been judged.

        The sampler may suggest again what it has seen, so that the search also ends when ten times
        as many suggestions as trials have brought nothing new.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=self.search.seed)
        study = optuna.create_study(direction="minimize", sampler=sampler)
        for _ in range(10 * self.search.num_trials):
            room = self.search.num_trials - len(self.judged)
            if room <= 0:
                return
            trials = [study.ask() for _ in range(min(self.search.batch, room))]
            points = [space.suggest(trial) for trial in trials]
            yield points
            for trial, point in zip(trials, points, strict=True):
                self._tell(study, trial, self.judged[point])

    def _tell(self, study: Any, trial: Trial, judgement: Judgement) -> None:
        trial.set_constraint(self.search.within.value, judgement.violation)
        study.tell(trial, judgement.value)


def judge(row: rows.Row, search: Search) -> Judgement:
    """Whether a configuration is feasible, and what it is worth."""
    figures = row["figures"]
    if row["error"]:
        return Judgement(0.0, REFUSED + search.met_share, row["error"])
    value, met = figures.get(search.minimise), figures["slo_share"]
    lack = search.met_share - met
    if figures["overloaded"]:
        return Judgement(value or 0.0, OVERLOADED + lack, "overloaded: there is no steady state")
    if lack > 0:
        why = f"{met:.2%} of the requests met the SLO, and search.met_share={search.met_share}"
        return Judgement(value or 0.0, lack, why)
    if value is None:
        why = f"{search.minimise} is not known for it"
        return Judgement(0.0, REFUSED + search.met_share, why)
    return Judgement(value, lack, "")
