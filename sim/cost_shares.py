"""Where the seconds of a run come from: a datasheet, measurements, or a guess beyond them."""

from collections.abc import Sequence

import numpy as np

from sim.costs.base import IterationCost
from sim.costs.fitted import Fitted
from sim.trace import Trace


def cost_shares(cost: IterationCost, traces: Sequence[Trace]) -> dict[str, float]:
    """Share of the busy time of all traces by where its seconds come from."""
    if not isinstance(cost, Fitted):
        return {"datasheet roofline": 1.0}
    spent = beyond = 0.0
    for trace in traces:
        start_s, end_s = trace.iterations["start_s"], trace.iterations["end_s"]
        repeat = trace.decisions["repeat"]
        last = np.cumsum(repeat) - 1
        first = last + 1 - repeat
        # The iterations of a decision follow each other without a gap, the measured ones first.
        outside = first + cost.measured_iterations(trace.decisions)
        partly = outside <= last
        spent += float((end_s[last] - start_s[first]).sum())
        beyond += float((end_s[last[partly]] - start_s[outside[partly]]).sum())
    return {"fitted to measurements": 1 - beyond / spent, "extrapolated": beyond / spent}
