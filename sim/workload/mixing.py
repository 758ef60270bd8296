"""Random bits by counter: what is drawn depends on numbers alone, not on what was drawn before."""

import numpy as np
from numpy.typing import NDArray


def mixed(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Random bits that depend on each number only: splitmix64 (Steele et al., OOPSLA 2014)."""
    # Arrays of numpy wrap around without a warning, which its scalars give.
    bits = numbers + np.array([0x9E3779B97F4A7C15], dtype=np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.array([factor], dtype=np.uint64)
    return bits ^ (bits >> np.uint64(31))
