"""Elastic instances over time: a row an instance, a bar a group, its degree in it."""

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from scenarios.plot_style import INK, STYLE, write
from scenarios.plots import whole_run
from sim.plot_data import end_s
from sim.trace import PREFILL, Trace

SHADES = {True: ("#e8893b", "#c2611f"), False: ("#4a7fb5", "#2b5a8a")}
"""Of groups that prefill and of groups that decode: neighbours in time differ."""
HATCH = "////"
"""Of a member of a group that decodes and is no master."""
LABEL_BOX: dict[str, Any] = {"boxstyle": "square,pad=0.15", "linewidth": 0}
LABEL_SHARE = 0.012
"""Of the width of the picture: a bar that is narrower has no label."""
MOST_WINDOWS = 24
"""Places where `lively` looks for a stretch."""
GROUPS_SHOWN = 60
"""Bars a row that can still be told apart."""


class Stay(NamedTuple):
    """A group that lasts: one prefill, or rounds of one batch on the same instances."""

    prefills: bool
    instances: tuple[int, ...]
    masters: tuple[int, ...]
    start_s: float
    end_s: float

    @property
    def degree(self) -> int:
        """Instances of the group."""
        return len(self.instances)


def stays(trace: Trace) -> list[Stay]:
    """Groups of a trace in order of their starts; rounds that follow each other are one."""
    found: list[Stay] = []
    open_at: dict[tuple[int, ...], int] = {}
    for one in _groups(trace):
        before = open_at.get(one.instances)
        if before is not None and _goes_on(found[before], one, trace):
            found[before] = found[before]._replace(end_s=one.end_s)
            continue
        for at in one.instances:  # whoever was on them is over
            open_at = {key: value for key, value in open_at.items() if at not in key}
        if not one.prefills:
            open_at[one.instances] = len(found)
        found.append(one)
    return found


def _goes_on(before: Stay, one: Stay, trace: Trace) -> bool:
    """Whether a round is the next one of a group."""
    gap_s = one.start_s - before.end_s
    return not one.prefills and before.masters == one.masters and gap_s <= 0.005 * end_s(trace)


def _groups(trace: Trace) -> Iterable[Stay]:
    names = ("step", "group", "kind", "instance", "requests", "start_s", "end_s")
    rows = zip(*(trace.members[name].tolist() for name in names), strict=True)
    members: dict[tuple[int, int, int], list[tuple[int, int, float, float]]] = {}
    for at_step, group, kind, *rest in rows:
        members.setdefault((at_step, group, kind), []).append(tuple(rest))
    found: list[Stay] = []
    for (_, _, kind), each in members.items():
        ends = [end for *_, end in each if not np.isnan(end)]
        masters = tuple(at for at, requests, *_ in each if requests and kind != PREFILL)
        names_of = tuple(sorted(at for at, *_ in each))
        start_s = each[0][2]
        found.append(Stay(kind == PREFILL, names_of, masters, start_s, max(ends, default=start_s)))
    return sorted(found, key=lambda one: one.start_s)


def instances(axes: Axes, trace: Trace, title: str, window: tuple[float, float]) -> None:
    """Draw a row an instance.

    Args:
        axes: what to draw on.
        trace: of elastic instances.
        title: of the panel.
        window: seconds to show.
    """
    start, stop = window
    count = 1 + int(trace.members["instance"].max(initial=0))
    numbers = {True: 0, False: 0}
    for one in stays(trace):
        shades = SHADES[one.prefills]
        colour = shades[numbers[one.prefills] % len(shades)]
        numbers[one.prefills] += 1
        if one.end_s <= start or one.start_s >= stop:
            continue
        left, right = max(one.start_s, start), min(one.end_s, stop)
        for at in one.instances:
            holds_only = not one.prefills and at not in one.masters
            axes.barh(
                at, right - left, left=left, height=0.8, color=colour, edgecolor="white",
                linewidth=0.4, hatch=HATCH if holds_only else None,
            )  # fmt: skip
            if right - left >= LABEL_SHARE * (stop - start):
                axes.text(
                    (left + right) / 2, at, str(one.degree), ha="center", va="center", fontsize=8,
                    color="white", clip_on=True, bbox=LABEL_BOX | {"facecolor": colour},
                )  # fmt: skip
    axes.set_xlim(start, stop)
    axes.set_ylim(count - 0.5, -0.5)
    axes.set_yticks(range(count), [f"instance {at}" for at in range(count)])
    axes.grid(visible=False, axis="y")
    axes.set_title(title, color=INK)


def lively(trace: Trace) -> tuple[float, float]:
    """A stretch in which sizes of groups change most, with no more bars than can be told apart."""
    stop, found = end_s(trace), stays(trace)
    if len(found) <= GROUPS_SHOWN:
        return 0.0, stop
    starts = np.array([one.start_s for one in found])
    best = (-1, (0.0, stop))
    for first in np.linspace(0, len(found) - GROUPS_SHOWN, MOST_WINDOWS).astype(int).tolist():
        part = found[first : first + GROUPS_SHOWN]
        changes = len({(one.prefills, one.degree) for one in part})
        changes += sum(a.degree != b.degree for a, b in pairwise(part))
        window = float(starts[first]), max(one.end_s for one in part)
        best = max(best, (changes, window), key=lambda pair: pair[0])
    return best[1]


def two_timelines(simulated: Trace, measured: Trace, title: str, path: Path) -> Path:
    """Both panels over one time axis, the simulated one above.

    Args:
        simulated: of the simulator.
        measured: of the real run, of the same requests.
        title: of the picture.
        path: of the PNG, which is replaced.
    """
    window = 0.0, max(end_s(simulated), end_s(measured))
    with mpl.rc_context(STYLE):
        rows = 1 + int(measured.members["instance"].max(initial=0))
        figure = Figure(figsize=(11.0, 2.4 + 1.1 * rows), layout="constrained")
        panels: list[Axes] = figure.subplots(2, 1, sharex=True).tolist()
        for axes, trace, name in zip(
            panels, (simulated, measured), ("simulated", "measured"), strict=True
        ):
            instances(axes, trace, name, window)
        panels[1].set_xlabel("time (s)")
        legend(figure)
        figure.suptitle(title, x=0.01, ha="left")
        return write(figure, path)


def overview(trace: Trace, path: Path, title: str) -> Path:
    """A legible stretch of groups, and below it requests and free slots of the whole run.

    Args:
        trace: of elastic instances.
        path: of the PNG, which is replaced.
        title: what ran.
    """
    window = lively(trace)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11.0, 8.2), layout="constrained")
        close, queue, slots = figure.subplots(3, 1, height_ratios=(1.8, 1, 0.8)).tolist()
        heading = f"{title}: groups from {window[0]:.3g} s to {window[1]:.3g} s"
        instances(close, trace, heading, window)
        close.set_xlabel("time (s)")
        whole_run((queue, slots), trace, window, "free slots")
        legend(figure)
        return write(figure, path)


def legend(figure: Figure) -> None:
    """What the bars mean."""
    prefill, decode = SHADES[True][0], SHADES[False][0]
    handles: list[Any] = [
        Patch(color=prefill, label="prefill"), Patch(color=decode, label="decode, master"),
        Patch(facecolor=decode, edgecolor="white", hatch=HATCH, label="decode, only holds KV"),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles),
                  title="number in a bar: instances of its group")  # fmt: skip
