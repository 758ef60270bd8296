"""Where the seconds of a run come from: a datasheet, measurements, or a guess beyond them."""

from collections.abc import Sequence

import numpy as np

from hardware_models.scaling import ScalingBase
from sim.costs.base import IterationCost
from sim.costs.fitted import Fitted
from sim.costs.kernel_cost import KernelCost
from sim.costs.roofline import RooflineKernels
from sim.costs.scaled import ScaledIteration
from sim.costs.seconds import NOTHING
from sim.expert_setup import EvenCost
from sim.models.work import IterationShape
from sim.trace import DECODE, Trace

NAMES = {
    "measured": "measured points",
    "interpolated": "interpolated",
    "extrapolated": "extrapolated",
    "datasheet": "datasheet roofline",
}
"""What results call the parts of `Seconds`."""
FITTED = "fitted to measurements"
ASKED = 2_000
"""Decisions of a trace that are asked for their shares, about."""


def cost_shares(cost: IterationCost, traces: Sequence[Trace]) -> dict[str, float]:
    """Share of the busy time of all traces by where its seconds come from."""
    if isinstance(cost, Fitted):
        return _fitted_shares(cost, traces)
    if isinstance(cost, ScaledIteration):
        return _scaled_shares(cost.base, traces)
    if isinstance(cost, KernelCost):
        if isinstance(cost.kernels, RooflineKernels):
            return {NAMES["datasheet"]: 1.0}
        return _kernel_shares(cost, traces)
    if isinstance(cost, EvenCost):
        return _kernel_shares(cost, traces)
    return {NAMES["datasheet"]: 1.0}


def _kernel_shares(cost: KernelCost | EvenCost, traces: Sequence[Trace]) -> dict[str, float]:
    """Parts without a share are left out. A decode stretch is judged by its middle iteration.

    Of a long run every n-th decision is asked: the shares of thousands say those of all.
    """
    spent = NOTHING
    for trace in traces:
        decisions = trace.decisions
        every = slice(None, None, max(1, len(decisions["repeat"]) // ASKED))
        repeat = decisions["repeat"][every]
        columns = [decisions[field][every].tolist() for field in IterationShape._fields]
        for count, *fields in zip(repeat.tolist(), *columns, strict=True):
            shape = IterationShape(*fields)
            middle = shape.decode_context + shape.num_decodes * (count - 1) // 2
            spent = spent.plus(cost.sources(shape._replace(decode_context=middle)).times(count))
    parts = zip(spent._fields, spent, strict=True)
    return {NAMES[name]: part / spent.total for name, part in parts if part}


def _scaled_shares(base: ScalingBase, traces: Sequence[Trace]) -> dict[str, float]:
    """By the degree of each group: of those that were measured, and of the others."""
    measured, total = 0.0, 0.0
    for trace in traces:
        members = trace.members
        if not len(members["step"]):  # one instance at a time
            return {FITTED: 1.0} if 1 in base.measured_degrees else {NAMES["interpolated"]: 1.0}
        keys = np.stack([members[name] for name in ("step", "kind", "group")])
        _, group, size = np.unique(keys, axis=1, return_inverse=True, return_counts=True)
        seconds = np.nan_to_num(members["end_s"] - members["start_s"])
        known = np.isin(size[group.reshape(-1)], base.measured_degrees)
        measured += float(seconds[known | (members["kind"] == DECODE)].sum())
        total += float(seconds.sum())
    shares = {FITTED: measured / total, NAMES["interpolated"]: 1 - measured / total}
    return {name: share for name, share in shares.items() if share}


def _fitted_shares(cost: Fitted, traces: Sequence[Trace]) -> dict[str, float]:
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
    return {FITTED: 1 - beyond / spent, "extrapolated": beyond / spent}
