"""Seconds, kept apart by what they rest on."""

from typing import NamedTuple


class Seconds(NamedTuple):
    """How long something takes, split by where the number comes from."""

    measured: float = 0.0
    """Read off a measured table at one of its points."""
    interpolated: float = 0.0
    """Between measured points."""
    extrapolated: float = 0.0
    """Beyond them: a roofline scaled to the nearest measured point, or another GPU's table."""
    datasheet: float = 0.0
    """From a roofline, an engine profile or a link's datasheet alone."""

    @property
    def total(self) -> float:
        """All of them."""
        return self[0] + self[1] + self[2] + self[3]

    def plus(self, other: "Seconds") -> "Seconds":
        """One after the other."""
        return Seconds(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, factor: float) -> "Seconds":
        """As often as `factor` says."""
        return Seconds(*(factor * part for part in self))

    def as_extrapolated(self) -> "Seconds":
        """The same time, when what it was measured on only stands in for what is meant."""
        known = self.measured + self.interpolated
        return Seconds(extrapolated=known + self.extrapolated, datasheet=self.datasheet)


NOTHING = Seconds()
