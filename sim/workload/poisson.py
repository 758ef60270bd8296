"""Poisson arrivals: independent users, exponential gaps."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sim.workload.arrivals import OpenLoop


@dataclass(kw_only=True)
class Poisson(OpenLoop):
    """Requests that come independently of each other at a mean rate."""

    def gaps(self, rng: np.random.Generator, count: int) -> NDArray[np.float64]:
        """The next gaps, exponential with mean one."""
        return rng.standard_exponential(count)
