"""`diptych report DIR...`: figures, pictures and a Perfetto trace of saved results."""

from collections.abc import Sequence
from pathlib import Path

from scenarios import rows, tables
from scenarios.saved import Saved, load


def main(argv: Sequence[str]) -> int:
    """Report every folder that is named; that of a sweep, broken off or not, gives its table.

    Raises:
        ValueError: no folder is named, or one holds no result.
    """
    if not argv:
        raise ValueError("report needs a folder; name one that `diptych run` wrote, below runs/")
    for argument in argv:
        path = Path(argument)
        if found := rows.read(path):
            rows.show(found)
        else:
            report(load(path))
    return 0


def report(saved: Saved) -> list[Path]:
    """Print the figures of a result and draw its trace; returns the files written.

    Raises:
        ValueError: it was saved without a trace.
    """
    scenario = saved.configuration
    machine = (scenario["node"] or scenario["gpu"])["name"]
    batching = scenario["policy_kinds"]["batching"]
    title = f"{scenario['name']}: {scenario['model']['name']} on {machine}, {batching}"
    out = tables.console()
    out.print(f"{title} ({saved.num_seeds} seeds)", style="bold")
    reason = tables.overload_reason(saved.summary["overloaded_seeds"], saved.num_seeds)
    tables.show_result(saved.figures, reason, saved.summary["cost_shares"])
    trace = saved.trace()

    # Matplotlib takes a second to import, which a refused folder should not wait for.
    from scenarios import latency_plot, perfetto, plots

    folder = saved.folder
    written = [
        plots.run_overview(trace, folder / "timeline.png", title),
        latency_plot.latencies(trace, folder / "latency.png", title, scenario["slo"]["ttft_s"]),
        perfetto.write(trace, folder / "trace.perfetto.json"),
    ]
    for path in written:
        out.print(f"wrote {path}", soft_wrap=True)
    out.print("trace.perfetto.json opens in ui.perfetto.dev")
    return written
