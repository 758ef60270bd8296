"""Max-min fair rates: no flow can go faster without slowing one that is no faster.

Progressive filling (Bertsekas and Gallager, "Data Networks", section 6.5.2): all rates grow
together; the flows on a link that fills up stay at that rate, the others grow on.
"""

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.intp]
FloatArray = NDArray[np.float64]
TIE = 1e-12
"""Links whose shares differ relatively by no more fill up together: rounding parts no equals."""


def max_min_rates(
    capacity: FloatArray, flow: IntArray, link: IntArray, uses: FloatArray, num_flows: int
) -> FloatArray:
    """The max-min fair rate of every flow, or of every flow of a class.

    Args:
        capacity: of every link, zero or more, in any unit of rate.
        flow: of every crossing of a flow (class) and a link: which flow. Shape: crossings.
        link: likewise, which link.
        uses: likewise, flows of the class that cross the link (times, if a flow crosses it twice).
        num_flows: flows (classes); one that crosses no link gets an infinite rate.
    """
    left = capacity.astype(np.float64)
    rates = np.full(num_flows, np.inf)
    while len(flow):
        weight = np.bincount(link, uses, minlength=len(left))
        share = np.full(len(left), np.inf)
        np.divide(left, weight, out=share, where=weight > 0)
        level = max(float(share.min()), 0.0)
        full = share <= level * (1 + TIE)
        frozen = np.zeros(num_flows, np.bool_)
        frozen[flow[full[link]]] = True
        rates[frozen] = level
        gone = frozen[flow]
        left -= np.bincount(link[gone], uses[gone] * level, minlength=len(left))
        flow, link, uses = flow[~gone], link[~gone], uses[~gone]
    return rates
