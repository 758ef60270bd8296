"""How long requests and tokens waited, as cumulative distributions."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from scenarios.plot_style import COLOURS, STYLE, WAITING, write
from sim.metrics import inter_token_gaps, request_times
from sim.trace import DECODE, PREFILL, Trace


def latencies(trace: Trace, path: Path, title: str, ttft_slo_s: float | None = None) -> Path:
    """Cumulative distributions of TTFT and of the gaps between tokens (ITL).

    Args:
        trace: of one replica.
        path: of the PNG, which is replaced.
        title: what ran.
        ttft_slo_s: the demand on TTFT, drawn as a line where there is one.
    """
    ttft_s = np.sort(request_times(trace).ttft_s)
    gaps = inter_token_gaps(trace)
    seen = np.flatnonzero(gaps.weight)
    order = seen[np.argsort(gaps.gap_s[seen])]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11.0, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _distribution(left, ttft_s, np.ones(len(ttft_s)), "time to first token", COLOURS[PREFILL])
        _distribution(right, gaps.gap_s[order], gaps.weight[order], "gap between tokens",
                      COLOURS[DECODE])  # fmt: skip
        if ttft_slo_s is not None:
            left.axvline(ttft_slo_s, color=WAITING, linestyle="--", linewidth=1.2)
            left.text(ttft_slo_s, 0.03, " SLO", color=WAITING, fontsize=9)
        left.set_ylabel("share of requests")
        right.set_ylabel("share of tokens")
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        return write(figure, path)


def _distribution(axes: Axes, values: Any, weights: Any, label: str, colour: str) -> None:
    axes.set_xlabel(label)
    if not len(values):  # answers of one token have no gaps
        axes.text(0.5, 0.5, "none", ha="center", transform=axes.transAxes)
        return
    total = np.cumsum(weights) / max(weights.sum(), 1)
    axes.step(values, total, where="post", color=colour, linewidth=2)
    axes.set_xscale("log")
    axes.margins(x=0.14)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
    axes.xaxis.set_major_formatter(FuncFormatter(_milliseconds))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    for share in (0.5, 0.99):
        at = float(values[min(np.searchsorted(total, share), len(values) - 1)])
        axes.plot([at], [share], "o", color=colour, markersize=5)
        axes.annotate(f"p{share * 100:.0f}  {_milliseconds(at, 0)}", (at, share), (8, -12),
                      textcoords="offset points", fontsize=9)  # fmt: skip


def _milliseconds(value: float, _: object) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
