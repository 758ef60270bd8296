"""Attention and expert ranks that alternate: one iteration, simulated above, measured below."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from scenarios.plot_style import STYLE, write
from sim.expert_rows import Span
from sim.processes.exact_time import ExactEnvironment
from sim.processes.stations import STATIONS, Iteration, StageTimes, Visit

MICRO_BATCHES = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
"""Paul Tol's bright scheme: told apart by colour-blind readers too."""
SHOWN_LAYERS = 4
"""Of an iteration: enough to see the alternation, few enough to see its bars."""


def two_pipelines(
    simulated: Sequence[Span], measured: Sequence[Span], title: str, path: Path
) -> Path:
    """Draw both panels over one time axis.

    Args:
        simulated: of one iteration.
        measured: of one iteration; resources that only one panel has are drawn there alone.
        title: of the picture.
        path: of the PNG, which is replaced.
    """
    shown = [first_layers(spans) for spans in (simulated, measured)]
    longest_s = max(end for spans in shown for *_, end, _ in spans)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11.0, 5.4), layout="constrained")
        panels: list[Axes] = figure.subplots(
            2, 1, sharex=True, height_ratios=[_rows(spans) for spans in shown]
        ).tolist()
        for ax, spans, name in zip(panels, shown, ("simulated", "measured"), strict=True):
            draw_pipeline(ax, spans)
            ax.set_title(name)
        panels[1].set_xlabel("ms from the start of the iteration")
        panels[1].set_xlim(0, longest_s * 1e3)
        count = 1 + max(span[4] for span in simulated)
        figure.legend(
            handles=[
                Patch(color=MICRO_BATCHES[at % len(MICRO_BATCHES)], label=f"micro-batch {at}")
                for at in range(count)
            ],
            loc="outside lower center", ncols=count,
        )  # fmt: skip
        figure.suptitle(f"{title}: the first {SHOWN_LAYERS} layers", x=0.01, ha="left")
        return write(figure, path)


def first_layers(spans: Sequence[Span]) -> list[Span]:
    """What begins before the first layers are over, transfers and sums included."""
    end_s = max(
        end for _, operation, _, end, _ in spans
        if operation.startswith("layer") and int(operation.split()[1]) < SHOWN_LAYERS
    )  # fmt: skip
    return [span for span in spans if span[2] < end_s]


def _rows(spans: Sequence[Span]) -> int:
    return len({span[0] for span in spans})


def visited(times: StageTimes) -> list[Span]:
    """What the stations of a simulated iteration do."""
    visits: list[Visit] = []
    environment = ExactEnvironment()
    environment.run(until=Iteration(environment, times, visited=visits.append).done)
    return [
        (STATIONS[one.station], f"layer {one.layer}", one.start_s, one.end_s, one.micro_batch)
        for one in visits
    ]


def draw_pipeline(ax: Axes, spans: Sequence[Span]) -> None:
    """A row a resource, a colour a micro-batch, over milliseconds."""
    found = {span[0] for span in spans}
    names = sorted(found, key=lambda name: (STATIONS.index(name.split()[0]), name))
    for resource, operation, start_s, end_s, micro_batch in spans:
        ax.barh(
            names.index(resource), (end_s - start_s) * 1e3, left=start_s * 1e3, height=0.72,
            color=MICRO_BATCHES[micro_batch % len(MICRO_BATCHES)], edgecolor="white",
            linewidth=0.4, alpha=1.0 if operation.startswith("layer") else 0.5,
        )  # fmt: skip
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
