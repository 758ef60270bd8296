"""What a search may choose: the values of keys, as Optuna suggests them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import inf, prod
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep, Override

from scenarios.points import Point, discrete_values

if TYPE_CHECKING:
    from optuna.trial import Trial


@dataclass(frozen=True)
class Interval:
    """A key with all numbers between two."""

    key: str
    low: float
    high: float
    whole: bool
    log: bool

    def suggest(self, trial: Trial) -> str:
        """An override with a number from it."""
        if self.whole:
            value = trial.suggest_int(self.key, int(self.low), int(self.high), log=self.log)
            return f"{self.key}={value}"
        return f"{self.key}={trial.suggest_float(self.key, self.low, self.high, log=self.log)!r}"

    @property
    def ends(self) -> list[str]:
        """Overrides with its first and last number."""
        kind = int if self.whole else float
        return [f"{self.key}={kind(end)!r}" for end in (self.low, self.high)]


@dataclass(frozen=True)
class Space:
    """What each key may be: overrides to choose from, or an interval."""

    axes: Mapping[str, list[str] | Interval]

    @property
    def size(self) -> float:
        """How many configurations there are; infinite with an interval."""
        axes = self.axes.values()
        return prod(inf if isinstance(axis, Interval) else len(axis) for axis in axes)

    def every(self) -> list[Point]:
        """All configurations of a finite space."""
        return list(product(*(axis for axis in self.axes.values() if isinstance(axis, list))))

    def suggest(self, trial: Trial) -> Point:
        """One configuration, as the sampler of a trial chooses it."""
        return tuple(
            axis.suggest(trial)
            if isinstance(axis, Interval)
            else axis[0]
            if len(axis) == 1
            else str(trial.suggest_categorical(key, axis))
            for key, axis in self.axes.items()
        )

    def ends(self) -> dict[str, list[str]]:
        """Every value once, of an interval both ends: what must compose before a trial runs."""
        return {
            key: axis.ends if isinstance(axis, Interval) else axis
            for key, axis in self.axes.items()
        }


def axis(override: Override) -> list[str] | Interval:
    """What an override lets a search choose.

    Raises:
        ValueError: an interval that holds no number, or none that has a logarithm.
    """
    value: Any = override.value()
    if not isinstance(value, IntervalSweep):
        return discrete_values(override)
    low, high, log = value.start, value.end, "log" in value.tags
    if low is None or high is None or not low < high or (log and low <= 0):
        rule = "must begin above 0 and below its end" if log else "must begin below its end"
        raise ValueError(f"{override.input_line}: the interval {rule}")
    whole = isinstance(low, int) and isinstance(high, int)
    return Interval(override.get_key_element(), low, high, whole, log)


def in_hydras_words(space: Mapping[str, Any]) -> dict[str, str]:
    """A space of YAML, with lists as `choice(...)`; a single value stays one."""
    return {
        key: f"choice({','.join(str(one) for one in values)})"
        if isinstance(values, list)
        else str(values)
        for key, values in space.items()
    }
