"""Pictures of a trace. Every function takes what it draws on or where it writes, and a `Trace`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from scenarios.plot_style import COLOURS, FREE, INK, STYLE, WAITING, write
from sim.plot_data import KIND_NAMES, Steps, batch_sizes, counts, end_s, legible_window
from sim.trace import Trace
from sim.trace_merge import num_replicas, of_replica

FEW = 400
"""Up to so many bars, each gets an outline of its own."""
MOST_ROWS = 4
"""Replicas that the diptych shows; of more, the first."""


def timeline(
    axes: Axes, trace: Trace, title: str, window: tuple[float, float] | None = None
) -> None:
    """Iterations as bars (width: duration, height: requests in the batch), running requests above.

    Args:
        axes: what to draw on.
        trace: of one replica.
        title: of the panel.
        window: seconds to show; None: all.
    """
    start, stop = window or (0.0, end_s(trace))
    shown = (trace.iterations["end_s"] > start) & (trace.iterations["start_s"] < stop)
    sizes = batch_sizes(trace)[shown]
    _bars(axes, trace, shown, sizes)
    _step(axes, counts(trace).running, INK, stop, width=1.3)
    top = max(int(sizes.max(initial=1)), _highest(counts(trace).running, start, stop))
    axes.set_xlim(start, stop)
    axes.set_ylim(0, top * 1.12)
    axes.set_title(title)
    axes.set_ylabel("requests")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))


def two_panels(
    simulated: Trace, measured: Trace, path: Path, window: tuple[float, float] | None = None
) -> Path:
    """The diptych: the simulated panel above, the measured one below, on one time axis.

    Args:
        simulated: of the simulator.
        measured: of the real run.
        path: of the PNG, which is replaced.
        window: seconds to show; None: all of both.
    """
    span = window or (0.0, max(end_s(simulated), end_s(measured)))
    rows = _rows({"simulated": simulated, "measured": measured})
    with mpl.rc_context(STYLE):
        figure, panels = _figure(len(rows), (11.0, 2.8 * max(len(rows), 2)))
        for axes, (title, trace) in zip(panels, rows, strict=True):
            timeline(axes, trace, title, span)
        top = max(axes.get_ylim()[1] for axes in panels)
        for axes in panels:
            axes.set_ylim(0, top)
            axes.tick_params(labelbottom=axes is panels[-1])
        panels[-1].set_xlabel("time (s)")
        kinds = set(simulated.iterations["kind"].tolist() + measured.iterations["kind"].tolist())
        _legend(figure, kinds)
        return write(figure, path)


def whole_run(
    panels: tuple[Axes, Axes], trace: Trace, window: tuple[float, float], free: str
) -> None:
    """Requests, and below them free KV, of a whole run.

    Args:
        panels: for the two.
        trace: of the run.
        window: what is shown from near elsewhere, in seconds; marked.
        free: what is counted as free KV.
    """
    queue, blocks = panels
    stop, found = end_s(trace), counts(trace)
    _step(queue, found.running, INK, stop, label="running")
    _step(queue, found.waiting, WAITING, stop, label="waiting")
    queue.set_title("whole run")
    queue.set_ylabel("requests")
    queue.tick_params(labelbottom=False)
    queue.legend(loc="upper right", ncols=2)
    _step(blocks, found.free_blocks, FREE, stop)
    blocks.set_ylabel(free)
    blocks.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    blocks.set_xlabel("time (s)")
    for axes in panels:
        axes.set_xlim(0, stop)
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
        axes.axvspan(*window, color="#f2c14e", alpha=0.35, linewidth=0)
    queue.set_ylim(top=1.2 * queue.get_ylim()[1])


def _rows(sides: Mapping[str, Trace]) -> list[tuple[str, Trace]]:
    """What has iterations of its own, replica by replica, the sides of each below each other."""
    count = max(map(num_replicas, sides.values()))
    if count == 1:
        return list(sides.items())
    return [
        (f"{side}, replica {number}", of_replica(trace, number))
        for number in range(min(count, MOST_ROWS))
        for side, trace in sides.items()
    ]


def run_overview(trace: Trace, path: Path, title: str) -> Path:
    """A legible stretch of iterations, and below it queue, batch and KV blocks of the whole run.

    Args:
        trace: of one replica or several.
        path: of the PNG, which is replaced.
        title: what ran.
    """
    # Several replicas share no bars: the first one is shown from near, all of them below.
    near = of_replica(trace, 0) if num_replicas(trace) > 1 else trace
    title = title if near is trace else f"{title}, replica 0 of {num_replicas(trace)}"
    window = legible_window(near)
    with mpl.rc_context(STYLE):
        figure, (close, queue, blocks) = _figure(3, (11.0, 7.6), heights=(1.5, 1, 0.8))
        timeline(close, near, f"{title}: iterations from {window[0]:.3g} s to {window[1]:.3g} s",
                 window)  # fmt: skip
        close.set_xlabel("time (s)")
        whole_run((queue, blocks), trace, window, "free KV blocks")
        _legend(figure, set(trace.iterations["kind"].tolist()))
        return write(figure, path)


def _figure(
    rows: int, size: tuple[float, float], heights: Sequence[float] | None = None
) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=size, layout="constrained")
    ratios = heights or [1.0] * rows
    return figure, figure.subplots(rows, 1, height_ratios=ratios, squeeze=True).tolist()


def _bars(axes: Axes, trace: Trace, shown: Any, sizes: Any) -> None:
    left, right = trace.iterations["start_s"][shown], trace.iterations["end_s"][shown]
    kinds = trace.iterations["kind"][shown]
    for kind, colour in COLOURS.items():
        mine = kinds == kind
        low, high, size = left[mine], right[mine], sizes[mine]
        zero = np.zeros(len(low))
        sides = ((low, zero), (low, size), (high, size), (high, zero))
        corners: Any = np.stack([np.stack(side, axis=1) for side in sides], axis=1)
        outlined = len(left) <= FEW
        bars = PolyCollection(corners, facecolor=colour, antialiased=outlined)
        bars.set_edgecolor("white" if outlined else "none")
        bars.set_linewidth(0.6 if outlined else 0)
        axes.add_collection(bars, autolim=False)


def _step(
    axes: Axes, steps: Steps, colour: str, stop: float, label: str = "", width: float = 1.4
) -> None:
    """Draw a count that changes at instants, up to the end of a run."""
    at = np.append(steps.instant_s, stop)
    value = np.append(steps.value, steps.value[-1])
    axes.step(at, value, where="post", color=colour, linewidth=width, label=label or None)


def _highest(steps: Steps, start: float, stop: float) -> int:
    inside = (steps.instant_s >= start) & (steps.instant_s <= stop)
    return int(steps.value[inside].max(initial=1))


def _legend(figure: Figure, kinds: set[int]) -> None:
    handles: list[Any] = [
        Patch(facecolor=colour, label=KIND_NAMES[kind])
        for kind, colour in COLOURS.items()
        if kind in kinds
    ]
    handles.append(Line2D([], [], color=INK, linewidth=1.3, label="running requests"))
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles))
