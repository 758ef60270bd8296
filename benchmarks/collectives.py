"""How right are the costs of collectives, and how fast is a network of a thousand GPUs?

Held-out sizes of one table; another laboratory's table of the same GPU; DeepEP's published
latencies; datasheet links alone; and a 1,024-GPU all-to-all as flows. Beside the tables stands what
one would take instead: latency + bytes / bandwidth, fitted to the same points.

    python benchmarks/collectives.py [--apex FOLDER] [--vidur FOLDER] [--gpus 1024]

FOLDER of --apex holds a folder a GPU (H100-SXM-80GB, H200-SXM-141GB), that of --vidur a100_dgx.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from hardware_models.parts import load_node
from hardware_models.schema import Cluster
from sim.costs.collective_csv import read_apex, read_vidur
from sim.costs.collective_silicon import read_silicon, silicon_gpus
from sim.costs.collective_tables import CollectiveTable, Curve, Measured, fit_alpha_beta
from sim.costs.expert_all_to_all import (
    PHASES,
    exchanged_bytes,
    fit_expert_links,
    read_deepep,
)
from sim.costs.link_collectives import LinkCollectives
from sim.processes.exact_time import ExactEnvironment
from sim.processes.network import Network
from sim.provenance import commit, machine
from sim.state.links import Routes
from sim.state.max_min import max_min_rates

DATASHEETS = {"a100_80g": "fitted here", "h100_sxm": "", "h200": "", "l40s": "", "rtx_pro_6000": ""}
APEX = {"h100_sxm": "H100-SXM-80GB", "h200": "H200-SXM-141GB"}
DEEPEP_RANKS = (8, 16, 32, 64, 128, 256)
DEEPEP_US = {
    "dispatch": (77, 118, 155, 173, 192, 194),
    "combine": (114, 195, 273, 314, 369, 360),
}
"""DeepEP's README (docs/legacy.md): H800, 128 tokens, hidden 7168, top-8, low-latency kernels."""
Figures = dict[str, object]
CONSOLE = Console(width=110)


def main() -> None:
    """Measure, print the tables and, last, one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--apex", type=Path, help="folder of APEX's nccl-tests results by GPU")
    parser.add_argument("--vidur", type=Path, help="folder of Vidur's network profiles")
    parser.add_argument("--gpus", type=int, default=1024)
    options = parser.parse_args()
    try:
        foreign = list(others(options))  # first: a wrong folder is told before minutes of work
    except ValueError as error:
        parser.error(str(error))
    CONSOLE.print(f"{machine()}, commit {commit()}")
    figures: Figures = {"held_out": held_out(), "across_tables": across(foreign)}
    figures |= {"deepep": deepep(), "datasheet": datasheet(), "lookup": lookup()}
    figures["all_to_all"] = all_to_all(options.gpus)
    print(json.dumps(figures))


def held_out() -> Figures:
    """Median errors at sizes that a curve does not know, for every NCCL table."""
    table = grid(
        "Held-out sizes of one NCCL table, median relative error (target 5 %)",
        "GPU", "NCCL", "points", "each alone", "20 % at random", "latency + bytes/bandwidth",
        "repeats",
    )  # fmt: skip
    figures: Figures = {}
    for gpu in silicon_gpus():
        rows, version = read_silicon(gpu)
        curves = [curve for dtype in ("half", "int8") for curve in curves_of(rows, dtype, gpu)]
        alone = [error for curve in curves for error in leave_one_out(curve, cubic)]
        line = [error for curve in curves for error in leave_one_out(curve, straight)]
        rng = np.random.default_rng(0)
        fifth = [error for _ in range(5) for curve in curves for error in leave_fifth(curve, rng)]
        row = {
            "points": len(alone), "each_alone": median(alone), "fifth": median(fifth),
            "alpha_beta": median(line), "repeats": repeats(rows),
        }  # fmt: skip
        figures[gpu] = row
        shown = [percent(row[key]) for key in ("each_alone", "fifth", "alpha_beta", "repeats")]
        table.add_row(gpu, version, f"{len(alone):,}", *shown)
    CONSOLE.print(table)
    return figures


def across(foreign: list[tuple[str, str, list[Measured]]]) -> Figures:
    """Errors against another laboratory's table, at sizes left out of ours."""
    table = grid(
        "Another table of the same GPU, median relative (target: no worse than apart + 5 points)",
        "GPU", "other", "operation", "points", "tables apart", "our error", "held",
    )  # fmt: skip
    figures: Figures = {}
    for gpu, other, rows in foreign:
        ours, _ = read_silicon(gpu)
        both = compare(
            CollectiveTable(ours, "half", name=gpu), [r for r in rows if r.num_nodes == 1]
        )
        everything = [pair for pairs in both.values() for pair in pairs]
        for operation, pairs in [*sorted(both.items()), ("all", everything)]:
            apart, error = (median([pair[i] for pair in pairs]) for i in (0, 1))
            held = error <= apart + 0.05
            figures[f"{gpu} {other} {operation}"] = {"apart": apart, "error": error, "held": held}
            shown = [percent(apart), percent(error), "yes" if held else "no"]
            table.add_row(gpu, other, operation, str(len(pairs)), *shown)
    if figures:
        CONSOLE.print(table)
    else:
        CONSOLE.print("Across tables: not run; give --apex or --vidur")
    return figures


def others(options: argparse.Namespace) -> Iterator[tuple[str, str, list[Measured]]]:
    """Other laboratories' fp16 rows by GPU."""
    if options.apex is not None:
        for gpu, folder in APEX.items():
            yield gpu, "apex", [r for r in read_apex(options.apex / folder) if r.dtype == "half"]
    if options.vidur is not None:
        yield "a100_80g", "vidur", read_vidur(options.vidur / "a100_dgx")


def compare(ours: CollectiveTable, rows: list[Measured]) -> dict[str, list[tuple[float, float]]]:
    """For every operation and common point: (how far the tables part, our error without it)."""
    both: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        curve = ours.curves.get((row.operation, row.num_ranks, row.num_nodes))
        if curve is None or row.payload_bytes not in curve.payloads[1:-1]:
            continue
        i = curve.payloads.index(row.payload_bytes)
        predicted = without(curve, [i]).at(row.payload_bytes).seconds
        both[row.operation].append((
            abs(curve.measured_s[i] / row.seconds - 1), abs(predicted / row.seconds - 1)
        ))  # fmt: skip
    return dict(both)


def deepep() -> Figures:
    """DeepEP on H800 as published, predicted from hops that were fitted to H100's table alone."""
    ratio = nvlink("h800_sxm") / nvlink("h100_sxm")
    columns = [f"{phase} {what}" for phase in PHASES for what in ("published", "ours", "error")]
    title = "DeepEP low-latency on H800, from the table of H100, NVLink scaled (target 10 %)"
    table = grid(title, "ranks", *columns)
    rows = read_deepep("h100_sxm")
    cells: dict[str, list[float]] = {}
    in_table: list[float] = []
    fitted = {phase: fit_expert_links(rows, phase) for phase in PHASES}
    reached = max(links.inside.bytes_per_s for links in fitted.values())
    for phase, links in fitted.items():
        in_table += [
            abs(links.seconds(row.payload_bytes, row.num_nodes) / row.seconds - 1)
            for row in rows
            if row.phase == phase
        ]
        here, payload = links.with_gpu_link(ratio, reached), exchanged_bytes(phase, 128, 8, 7168)
        cells[phase] = [here.seconds(payload, ranks // 8) * 1e6 for ranks in DEEPEP_RANKS]
    errors: list[float] = []
    for i, ranks in enumerate(DEEPEP_RANKS):
        shown: list[str] = []
        for phase in PHASES:
            published, ours = DEEPEP_US[phase][i], cells[phase][i]
            errors.append(ours / published - 1)
            shown += [f"{published} us", f"{ours:.0f} us", f"{errors[-1]:+.1%}"]
        table.add_row(str(ranks), *shown)
    CONSOLE.print(table)
    figures: Figures = {
        "median": median(np.abs(errors)), "worst": float(np.abs(errors).max()),
        "fit_on_its_own_table": median(in_table),
    }  # fmt: skip
    CONSOLE.print(f"median {figures['median']:.1%}; fit on its own table {median(in_table):.1%}")
    return figures


def datasheet() -> Figures:
    """Errors of datasheet links with one fit, made on A100, of what NCCL makes of them."""
    table = grid(
        "NCCL from datasheet links alone, median relative error; fitted on A100 only",
        "GPU", "up to 64 KiB", "to 16 MiB", "above", "all",
    )  # fmt: skip
    figures: Figures = {}
    for gpu, remark in DATASHEETS.items():
        cost = LinkCollectives(load_node(f"{gpu}_x8"))
        ours = CollectiveTable(read_silicon(gpu)[0], "half", name=gpu)
        points: list[tuple[float, float]] = []
        for (operation, ranks, _), curve in ours.curves.items():
            for payload, seconds in zip(curve.payloads, curve.measured_s, strict=True):
                predicted = cost.seconds(operation, ranks, payload).seconds
                points.append((payload, abs(predicted / seconds - 1)))
        edges = [0, 2**16, 2**24, np.inf]
        parts = [
            median([error for payload, error in points if low < payload <= high])
            for low, high in pairwise(edges)
        ]
        parts.append(median([error for _, error in points]))
        figures[gpu] = dict(zip(("small", "middle", "large", "all"), parts, strict=True))
        table.add_row(f"{gpu} {remark}".strip(), *map(percent, parts))
    CONSOLE.print(table)
    return figures


def lookup() -> Figures:
    """Seconds to load a table; microseconds to ask it for the first time and again."""
    start = time.perf_counter()
    table = CollectiveTable(read_silicon("h100_sxm")[0], "half", name="h100_sxm")
    load_s = time.perf_counter() - start
    sizes = [float(size) for size in np.random.default_rng(0).integers(1, 2**29, 10_000)]
    taken: list[float] = []
    for _ in range(2):
        start = time.perf_counter()
        for size in sizes:
            table.seconds("all_reduce", 8, size)
        taken.append((time.perf_counter() - start) / len(sizes) * 1e6)
    CONSOLE.print(f"load {load_s:.2f} s, first answer {taken[0]:.1f} us, again {taken[1]:.2f} us")
    return {"load_s": load_s, "first_us": taken[0], "again_us": taken[1]}


def all_to_all(num_gpus: int) -> Figures:
    """Wall seconds of an all-to-all of H100 in nodes of eight, 1 MB a message."""
    node = load_node("h100_sxm_x8")
    nodes = num_gpus // node.num_gpus
    cluster = Cluster(name="benchmark", node=node, num_nodes=nodes, source="benchmark")
    routes = Routes(cluster)
    ranks = np.arange(routes.num_gpus)
    sources, destinations = (axis.ravel() for axis in np.meshgrid(ranks, ranks, indexing="ij"))
    apart = sources != destinations
    sources, destinations = sources[apart], destinations[apart]
    start = time.perf_counter()
    network = Network(ExactEnvironment(), routes)
    done = network.transfer_all(sources, destinations, 1e6)
    network.environment.run(done)
    wall_s = time.perf_counter() - start
    start = time.perf_counter()
    paths = routes.gpu_paths(sources, destinations)
    flow, hop = np.nonzero(paths >= 0)
    capacity = routes.links.capacity_bytes_per_s
    max_min_rates(capacity, flow, paths[flow, hop], np.ones(len(flow)), len(paths))
    flat_s = time.perf_counter() - start
    simulated_s = network.environment.now
    CONSOLE.print(
        f"all-to-all of {routes.num_gpus:,} GPUs, {len(paths):,} flows: {wall_s:.2f} s of wall "
        f"time for {simulated_s * 1e3:.2f} ms; flow by flow, one solution: {flat_s:.2f} s"
    )
    return {
        "gpus": routes.num_gpus, "flows": len(paths), "wall_s": wall_s,
        "simulated_s": simulated_s, "one_solution_without_classes_s": flat_s,
    }  # fmt: skip


def curves_of(rows: Sequence[Measured], dtype: str, name: str) -> list[Curve]:
    """All curves of a data type."""
    return list(CollectiveTable(rows, dtype, name=name).curves.values())


Predict = Callable[[Curve, int], float]


def cubic(curve: Curve, i: int) -> float:
    """Our answer at a size from all others."""
    return without(curve, [i]).at(curve.payloads[i]).seconds


def straight(curve: Curve, i: int) -> float:
    """Latency + bytes / bandwidth at a size, fitted to all others."""
    others = [j for j in range(len(curve.payloads)) if j != i]
    payloads, seconds = (
        [values[j] for j in others] for values in (curve.payloads, curve.measured_s)
    )
    return fit_alpha_beta(payloads, seconds).seconds(curve.payloads[i])


def leave_one_out(curve: Curve, predict: Predict) -> list[float]:
    """Errors at every inner size, each predicted from all others."""
    inner = range(1, len(curve.payloads) - 1)
    return [abs(predict(curve, i) / curve.measured_s[i] - 1) for i in inner]


def leave_fifth(curve: Curve, rng: np.random.Generator) -> list[float]:
    """Errors at a fifth of the inner sizes, predicted from the rest."""
    out = [i for i in range(1, len(curve.payloads) - 1) if rng.random() < 0.2]
    rest = without(curve, out)
    return [abs(rest.at(curve.payloads[i]).seconds / curve.measured_s[i] - 1) for i in out]


def without(curve: Curve, out: Sequence[int]) -> Curve:
    """The curve through all points but some."""
    points = list(zip(curve.payloads, curve.measured_s, strict=True))
    return Curve(point for i, point in enumerate(points) if i not in out)


def repeats(rows: Sequence[Measured]) -> float | None:
    """How far repeated rows of one point lie from their median; None where nothing was repeated."""
    groups: defaultdict[tuple[object, ...], list[float]] = defaultdict(list)
    for row in rows:
        groups[row[:-1]].append(row.seconds)
    parted = [abs(s / np.median(g) - 1) for g in groups.values() if len(g) > 1 for s in g]
    return median(parted) if parted else None


def nvlink(gpu: str) -> float:
    """Bandwidth of a GPU's link in its node of eight."""
    link = load_node(f"{gpu}_x8").gpu_link
    assert link is not None
    return link.bandwidth_bytes_per_s


def median(values: Sequence[float] | np.ndarray) -> float:
    """The median as a plain number."""
    return float(np.median(values))


def percent(value: object) -> str:
    """For a table; a dash where there is no number."""
    return f"{value:.1%}" if isinstance(value, float) else "-"


def grid(title: str, *columns: str) -> Table:
    """A table whose numbers stand right."""
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


if __name__ == "__main__":
    main()
