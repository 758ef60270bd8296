"""Bursty arrivals: gamma-distributed gaps with a chosen coefficient of variation."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sim.workload.arrivals import OpenLoop
from sim.workload.checks import require_positive


@dataclass(kw_only=True)
class Gamma(OpenLoop):
    """Requests that come in bursts (cv above 1) or evenly (cv below 1); cv = 1 is Poisson."""

    burstiness_cv: float
    """Standard deviation over mean of the gaps between requests (ratio)."""

    def __post_init__(self) -> None:
        """Refuses a burstiness that no gamma distribution has."""
        super().__post_init__()
        require_positive("burstiness_cv", self.burstiness_cv, 2.0)

    def gaps(self, rng: np.random.Generator, count: int) -> NDArray[np.float64]:
        """The next gaps, gamma with mean one and variance `burstiness_cv`**2."""
        shape = self.burstiness_cv**-2
        return rng.standard_gamma(shape, count) / shape
