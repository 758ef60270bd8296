"""`diptych report DIR...`: figures, pictures and a Perfetto trace of saved results."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from scenarios import rows, tables
from scenarios.saved import Saved, load
from scenarios.sweep_folder import PICTURE, SEARCH

AXES = ("x=", "y=")


def main(argv: Sequence[str]) -> int:
    """Report every folder that is named; that of a sweep, broken off or not, gives its table.

    `x=FIGURE` and `y=FIGURE` choose what the picture of a sweep shows.

    Raises:
        ValueError: no folder is named, one holds no result, or a sweep has no such figure.
    """
    chosen = dict(one.split("=", 1) for one in argv if one.startswith(AXES))
    folders = [Path(one) for one in argv if not one.startswith(AXES)]
    if not folders:
        raise ValueError("report needs a folder; name one that `diptych run` wrote, below runs/")
    for path in folders:
        if found := rows.read(path):
            report_sweep(path, found, chosen)
        else:
            report(load(path))
    return 0


def report_sweep(
    folder: Path, found: Sequence[rows.Row], chosen: Mapping[str, str] | None = None
) -> Path | None:
    """Print the table of a sweep and draw its points and their Pareto front.

    Args:
        folder: of the sweep; the picture goes there.
        found: its rows.
        chosen: figures to draw by axis, `x` and `y`; a cost and the p99 of TTFT by default.

    Returns:
        The picture; None where no cost differs between points and none was chosen.

    Raises:
        ValueError: a figure that the sweep does not have.
    """
    from scenarios import pareto

    named = chosen or {}
    x, y = named.get("x") or pareto.default_x(found), named.get("y") or pareto.LATENCY
    if x is not None:
        pareto.require_figures(found, (x, y))
    rows.show(found)
    out = tables.console()
    if x is None:
        out.print("no picture: the points do not differ in cost; choose figures by x=, y=")
        return None
    path = pareto.draw(found, (x, y), folder / PICTURE, infeasible(folder))
    out.print(f"wrote {path}: {y} against {x}", soft_wrap=True)
    return path


def infeasible(folder: Path) -> dict[str, str]:
    """Points of a search by label, and why each is infeasible, or nothing.

    Raises:
        ValueError: the file of the search is damaged.
    """
    path = folder / SEARCH
    if not path.exists():
        return {}
    try:
        trials = json.loads(path.read_text(encoding="utf-8"))["trials"]
        return {rows.label(one["choices"]): one["infeasible"] for one in trials}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); run the search with resume=true") from error


def report(saved: Saved) -> list[Path]:
    """Print the figures of a result and draw its trace; returns the files written.

    Raises:
        ValueError: it was saved without a trace.
    """
    scenario = saved.configuration
    machine = (scenario["node"] or scenario["gpu"])["name"]
    trace = saved.trace()
    elastic = len(trace.members["step"]) > 0  # then no batching policy was asked
    rule = scenario["policy_kinds"]["instance_plan" if elastic else "batching"]
    title = f"{scenario['name']}: {scenario['model']['name']} on {machine}, {rule}"
    out = tables.console()
    out.print(f"{title} ({saved.num_seeds} seeds)", style="bold")
    reason = tables.overload_reason(saved.summary["overloaded_seeds"], saved.num_seeds)
    tables.show_result(saved.figures, reason, saved.summary["cost_shares"])

    # Matplotlib takes a second to import, which a refused folder should not wait for.
    from scenarios import elastic_plot, latency_plot, perfetto, plots

    folder = saved.folder
    draw = elastic_plot.overview if elastic else plots.run_overview
    written = [
        draw(trace, folder / "timeline.png", title),
        latency_plot.latencies(trace, folder / "latency.png", title, scenario["slo"]["ttft_s"]),
        perfetto.write(trace, folder / "trace.perfetto.json"),
    ]
    for path in written:
        out.print(f"wrote {path}", soft_wrap=True)
    out.print("trace.perfetto.json opens in ui.perfetto.dev")
    return written
