"""How well the real panel predicts itself: one run, taken as the prediction of another.

No simulator can be closer to a run than the machine is to its own repeat. Under a policy in which a
request waits for whole batches, a few per cent of an iteration decide whether it catches one, and
then its latency changes by a batch.
"""

from collections.abc import Sequence
from itertools import permutations

import numpy as np

from scenarios.validation.intervals import Floats


def median_error(repeats: Sequence[Floats]) -> float | None:
    """Median relative error of one repeat's entries as the prediction of another's.

    Args:
        repeats: for each real run one entry a request, in the same order.

    Returns:
        None for a single run, which has nothing to be compared with.
    """
    errors = [np.abs(one / other - 1) for one, other in permutations(repeats, 2)]
    return float(np.median(np.concatenate(errors))) if errors else None
