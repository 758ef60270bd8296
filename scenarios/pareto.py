"""Which points of a sweep no other point beats: a picture of two figures with the Pareto front."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from hardware_models.names import alternatives
from scenarios import rows, tables
from scenarios.plot_style import INK, QUIET, STYLE, WAITING, write

MORE_IS_BETTER = ("throughput", "goodput", "slo_share", "busy_share", "flops_utilisation")
COSTS = (
    "usd_per_hour", "num_gpus", "usd_per_million_output_tokens", "throughput_requests_per_s",
)  # fmt: skip
"""What is drawn to the right unless another figure is named: the first that differs."""
LATENCY = "ttft_p99_s"
COLOURS = ("#4a7fb5", "#e8893b", "#3b8f6b", "#8a62a8", "#b5576b", "#7a6f45", "#4f9aa8", "#9a9a3c")
NAMED = 14
"""So many points of the front are named beside the picture."""


class Dot(NamedTuple):
    """A point of the sweep in the picture."""

    x: float
    y: float
    label: str
    """What it chose, where the points differ."""
    colour: str
    """Its choice of the first key in which points differ."""
    infeasible: bool


def default_x(found: Sequence[rows.Row]) -> str | None:
    """What a sweep's cost is: the first known figure in which its points differ, or None."""
    for name in COSTS:
        known = {row["figures"].get(name) for row in found if not row["error"]} - {None}
        if len(known) > 1:
            return name
    return None


def require_figures(found: Sequence[rows.Row], names: Sequence[str]) -> None:
    """Refuse a figure that no point has.

    Raises:
        ValueError: there is no such figure; the message lists them.
    """
    known = rows.union(row["figures"] for row in found)
    for name in names:
        if name not in known:
            raise ValueError(f"figure {name} is not in the sweep; {alternatives(name, known)}")


def front(dots: Sequence[Dot], x: str, y: str) -> list[Dot]:
    """The points that no other point beats in one figure without losing in the other, by `x`.

    Args:
        dots: the points.
        x: name of the figure to the right, which says whether more or less of it is better.
        y: likewise upwards.
    """
    signs = [-1.0 if name.startswith(MORE_IS_BETTER) else 1.0 for name in (x, y)]
    best, kept = float("inf"), []
    for dot in sorted(dots, key=lambda one: (signs[0] * one.x, signs[1] * one.y, one.label)):
        if signs[1] * dot.y < best:
            best = signs[1] * dot.y
            kept.append(dot)
    return sorted(kept, key=lambda one: one.x)


def draw(
    found: Sequence[rows.Row], axes: tuple[str, str], path: Path, infeasible: Mapping[str, str]
) -> Path:
    """Draw all points with both figures, and the front through the feasible ones.

    Args:
        found: rows of a sweep.
        axes: names of the figures to the right and upwards.
        path: of the PNG, which is replaced.
        infeasible: label of a point -> why a search found it so, or nothing.

    Raises:
        ValueError: a figure that no point has; the message lists them.
    """
    require_figures(found, axes)
    dots = _dots(found, axes, infeasible)
    if not dots:
        raise ValueError(f"no point of the sweep has both {axes[0]} and {axes[1]}; name others")
    best = front([dot for dot in dots if not dot.infeasible], *axes)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11.0, 5.2), layout="constrained")
        plot, side = figure.subplots(1, 2, width_ratios=(2.1, 1))
        _scatter(plot, dots)
        _stairs(plot, best, axes, _colours(dots))
        _scales(plot, dots, axes)
        _demand(plot, found, axes[1])
        lacking = f" of {len(found)}" if len(found) > len(dots) else ""
        plot.set_title(f"{tables.heading(axes[1])} against {tables.heading(axes[0])}: {len(dots)}"
                       f"{lacking} points")  # fmt: skip
        _names(side, best, axes)
        return write(figure, path)


def _dots(
    found: Sequence[rows.Row], axes: tuple[str, str], infeasible: Mapping[str, str]
) -> list[Dot]:
    # Parts say most, so they come first.
    keys = sorted(rows.varying(found), key=lambda key: "." in key)
    dots: list[Dot] = []
    for row in found:
        x, y = (row["figures"].get(name) for name in axes)
        if x is None or y is None:
            continue
        chosen = [row["choices"].get(key, "") for key in keys]
        outside = bool(infeasible.get(rows.label(row["choices"])))
        first = row["choices"].get("gpu") if "gpu" in keys else next(iter(chosen), "")
        dots.append(Dot(x, y, _short(keys, chosen), first or "", outside))
    return dots


def _short(keys: Sequence[str], chosen: Sequence[str]) -> str:
    """Names of parts alone, values with their key: l40s, chunked_prefill, rate_per_s=4."""
    named = (
        value if "/" in key or "." not in key else f"{key.rpartition('.')[2]}={value}"
        for key, value in zip(keys, chosen, strict=True)
    )  # fmt: skip
    return ", ".join(named)


def _scatter(plot: Axes, dots: Sequence[Dot]) -> None:
    colours = _colours(dots)
    for kind, colour in colours.items():
        for outside in (True, False):
            mine = [dot for dot in dots if dot.colour == kind and dot.infeasible == outside]
            plot.scatter(
                [dot.x for dot in mine], [dot.y for dot in mine], s=34, zorder=3,
                facecolor="none" if outside else colour, edgecolor=colour, alpha=0.85,
                label=None if outside else kind,
            )  # fmt: skip
    if any(dot.infeasible for dot in dots):
        plot.scatter([], [], s=34, facecolor="none", edgecolor=QUIET, label="not within the SLO")
    if 1 < len(colours) <= len(COLOURS) or any(dot.infeasible for dot in dots):
        plot.legend(loc="best", frameon=True, framealpha=0.9, edgecolor="none")


def _colours(dots: Sequence[Dot]) -> dict[str, str]:
    kinds = sorted({dot.colour for dot in dots})
    return {kind: COLOURS[place % len(COLOURS)] for place, kind in enumerate(kinds)}


def _stairs(
    plot: Axes, best: Sequence[Dot], axes: tuple[str, str], colours: Mapping[str, str]
) -> None:
    """The front as stairs: between two of its points nothing is known to be better."""
    where = "pre" if axes[0].startswith(MORE_IS_BETTER) else "post"
    plot.step([dot.x for dot in best], [dot.y for dot in best], where=where, color=INK,
              linewidth=1.4, zorder=2)  # fmt: skip
    for number, dot in enumerate(best[:NAMED], 1):
        plot.plot(dot.x, dot.y, "o", markersize=15, markerfacecolor=colours[dot.colour],
                  markeredgecolor=INK, markeredgewidth=1.4, zorder=4)  # fmt: skip
        plot.text(dot.x, dot.y, str(number), ha="center", va="center_baseline", fontsize=9,
                  color="white", fontweight="bold", zorder=5)  # fmt: skip


def _scales(plot: Axes, dots: Sequence[Dot], axes: tuple[str, str]) -> None:
    """Units that suit the values, and a logarithmic axis where they differ much."""
    values = ([dot.x for dot in dots], [dot.y for dot in dots])
    setters = (plot.set_xscale, plot.set_yscale)
    for name, these, rescale, axis in zip(
        axes, values, setters, (plot.xaxis, plot.yaxis), strict=True
    ):
        low, high = min(these), max(these)
        if low > 0 and high > 20 * low:
            rescale("log")
        scale, unit = tables.unit(name, high if high < 20 * max(low, 1e-12) else low)
        axis.set_major_formatter(FuncFormatter(lambda v, _, by=scale: tables.number(v * by)))
        axis.set_minor_formatter(NullFormatter())
        named = unit.strip() and not name.startswith("usd")
        axis.set_label_text(tables.heading(name) + (f" ({unit.strip()})" if named else ""))
    plot.margins(0.09)


def _demand(plot: Axes, found: Sequence[rows.Row], name: str) -> None:
    """The SLO as a line, where it is of the figure that is drawn and within sight."""
    demand = name.partition("_")[0]
    limits = {(row["configuration"].get("slo") or {}).get(f"{demand}_s") for row in found}
    limit = limits.pop() if len(limits) == 1 else None
    low, high = plot.get_ylim()
    if limit is not None and low < limit < 1.5 * high:
        plot.axhline(limit, color=WAITING, linewidth=1.1, linestyle=(0, (5, 3)), zorder=1)
        plot.annotate(f"SLO {tables.seconds(limit)}", (1, limit), (0, 3), va="bottom", ha="right",
                      xycoords=("axes fraction", "data"), textcoords="offset points",
                      color=WAITING, fontsize=9)  # fmt: skip


def _names(side: Axes, best: Sequence[Dot], axes: tuple[str, str]) -> None:
    """The points of the front, by number, with both figures."""
    side.set_axis_off()
    side.set_title("Pareto front")
    lines: list[str] = []
    for number, dot in enumerate(best[:NAMED], 1):
        at = ", ".join(tables.quantity(n, v) for n, v in zip(axes, dot[:2], strict=True))
        lines += [f"{number:>2}  {at}", f"     {dot.label}", ""]
    if len(best) > NAMED:
        lines.append(f"and {len(best) - NAMED} more to the right")
    if not best:
        lines = ["no point is within the SLO"]
    side.text(0, 0.98, "\n".join(lines), va="top", ha="left", fontsize=9, linespacing=1.3,
              transform=side.transAxes, wrap=True)  # fmt: skip
