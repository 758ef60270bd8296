"""How all pictures look, and how they are written."""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sim.files import whole_file
from sim.trace import DECODE, PREFILL

COLOURS = {PREFILL: "#e8893b", DECODE: "#4a7fb5", PREFILL | DECODE: "#8a62a8"}
"""Prefill, decode, mixed: apart in hue and in lightness."""
INK, QUIET, WAITING, FREE = "#222222", "#8a8f98", "#c0392b", "#3b8f6b"
STYLE: Any = {
    "font.family": "DejaVu Sans", "font.size": 10, "axes.edgecolor": QUIET,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
    "axes.titleweight": "bold", "axes.titlesize": 11, "xtick.color": INK, "ytick.color": INK,
    "axes.grid": True, "grid.color": "#e6e8eb", "grid.linewidth": 0.7, "axes.axisbelow": True,
    "legend.frameon": False, "legend.fontsize": 9,
}  # fmt: skip


def write(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, which is replaced; the same trace gives the same bytes."""
    FigureCanvasAgg(figure)
    with whole_file(path) as building:
        # The format is named, because the name of what is not complete has no suffix.
        figure.savefig(building, format="png", dpi=130, metadata={"Software": None})
    return path
