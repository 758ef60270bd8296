"""What runs when no workload is named: small, fixed lengths, nothing to download."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sim.workload.arrivals import OpenLoop


@dataclass(kw_only=True)
class Default(OpenLoop):
    """64 requests at 4 per second (Poisson), 128 tokens in and 32 out, so any model serves it."""

    input_tokens: int = 128
    """Mean length of a prompt, before the limits (tokens)."""
    output_tokens: int = 32
    """Mean length of an answer, before the limits (tokens)."""
    rate_per_s: float | None = 4.0
    """Mean requests per second."""
    num_requests: int | None = 64
    """How many requests come; null where `duration_s` is given instead."""

    def gaps(self, rng: np.random.Generator, count: int) -> NDArray[np.float64]:
        """The next gaps, exponential with mean one."""
        return rng.standard_exponential(count)
