"""Three requests on two panels: what they need was computed, in host memory, or on the GPU."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from scenarios.plot_style import COLOURS, INK, QUIET, STYLE, WAITING, write
from sim.knowledge_timeline import Found, clearest
from sim.knowledge_timeline import Path as Way
from sim.trace import PREFILL, Trace

PARTS = {
    "search": QUIET, "queue": "#d5d8dc", "copies": WAITING, "prefill": COLOURS[PREFILL],
}  # fmt: skip


def three_requests(simulated: Trace, measured: Trace, path: Path) -> Path | None:
    """Draw how a miss, a host hit and a GPU hit came to their first token.

    Args:
        simulated: of the simulator.
        measured: of the real run, of the same requests.
        path: of the PNG, which is replaced.

    Returns:
        The path; None, and nothing is drawn, where no request was found alike on both panels.
    """
    chosen = clearest((simulated, measured))
    if not chosen:
        return None
    longest_s = max(way.first_token_s for pair in chosen.values() for way in pair)
    unit, name = (1.0, "s") if longest_s >= 1 else (1e3, "ms")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11.0, 4.6), layout="constrained")
        panels: list[Axes] = figure.subplots(2, 1, sharex=True).tolist()
        for side, (axes, title) in enumerate(zip(panels, ("simulated", "measured"), strict=True)):
            first_tokens(axes, {kind: pair[side] for kind, pair in chosen.items()}, unit, name)
            axes.set_title(title)
        panels[-1].set_xlabel(f"time after arrival ({name})")
        panels[0].set_xlim(0, 1.15 * longest_s * unit)
        handles: list[Any] = [Patch(facecolor=c, label=part) for part, c in PARTS.items()]
        figure.legend(handles=handles, loc="outside upper right", ncols=len(handles))
        return write(figure, path)


def first_tokens(axes: Axes, ways: Mapping[Found, Way], unit: float = 1.0, name: str = "s") -> None:
    """A bar a request, its parts beside each other, the TTFT at its end.

    Args:
        axes: what to draw on.
        ways: of each request, by where its documents were.
        unit: of the axis, in parts of a second.
        name: of the unit.
    """
    rows = list(ways.items())
    for row, (_, way) in enumerate(rows):
        left_s = 0.0
        ends_s = (
            min(way.searched_s, way.admitted_s), way.admitted_s, way.copied_s, way.first_token_s,
        )  # fmt: skip
        for colour, end_s in zip(PARTS.values(), ends_s, strict=True):
            axes.barh(row, (end_s - left_s) * unit, left=left_s * unit, color=colour, height=0.6)
            left_s = end_s
        axes.annotate(f"{left_s * unit:.3g} {name}", (left_s * unit, row), (6, 0),
                      textcoords="offset points", va="center", color=INK, fontsize=9)  # fmt: skip
    labels = [f"{kind.value}\n(request {way.request})" for kind, way in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
