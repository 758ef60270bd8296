"""How far off are single kernels: measured tables between their points, and the datasheet roofline?

Tables: every fifth point is left out at random and asked for, and separately every fifth shape as a
whole (matrix of a product, batch of attention). Roofline: against all points of NVIDIA's tables, by
what bounds the kernel. The tables time a kernel over and over, so operands that fit the cache are
read from there; the roofline is told so.

    python benchmarks/operators.py [--gpus a100_80g,h100_sxm,l40s,rtx_pro_6000] [--seed 0]
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table as Printed

from hardware_models.parts import load_gpu
from sim.costs.kernel_model import KernelModel
from sim.costs.roofline import RooflineKernels
from sim.costs.silicon import Silicon, fastest, open_tables
from sim.costs.table import table
from sim.models.architecture import load_architecture
from sim.models.dimensions import Architecture
from sim.models.work import IterationShape
from sim.provenance import commit, machine

LAUNCH_BOUND_S = 4e-6
"""Kernels whose work takes less at the datasheet's peaks are bound by their launch."""

Rows = NDArray[np.float64]


class Operator:
    """Measured points of one operator on one GPU, and what the roofline says of each."""

    def __init__(
        self, name: str, rows: Rows, model_s: Callable[..., float], ideal_s: Callable[..., Rows],
        shape_axes: int,
    ) -> None:  # fmt: skip
        """Take points.

        Args:
            name: of the operator.
            rows: coordinates, outermost axis first, and seconds.
            model_s: seconds by the roofline, of coordinates.
            ideal_s: seconds of computing and of moving at the peaks, of columns of coordinates.
            shape_axes: leading axes that make up a shape, left out as a whole.
        """
        self.name = name
        self.points, self.seconds = rows[:, :-1], rows[:, -1]
        self.model = np.array([model_s(*point) for point in self.points.tolist()])
        self.computing, self.moving = ideal_s(*self.points.T)
        self.shape_axes = shape_axes

    def held_out(self, smooth_s: Callable[..., float], seed: int) -> dict[str, float]:
        """Median error of points and of shapes that the table was not given."""
        rng = np.random.default_rng(seed)
        ratios = self.seconds / np.array([smooth_s(*point) for point in self.points.tolist()])
        shapes, of = np.unique(self.points[:, : self.shape_axes], axis=0, return_inverse=True)
        out = {
            "points": rng.random(len(ratios)) < 0.2,
            "shapes": (rng.random(len(shapes)) < 0.2)[of.ravel()],
        }
        return {what: self._error(ratios, hidden) for what, hidden in out.items()}

    def _error(self, ratios: Rows, hidden: NDArray[np.bool_]) -> float:
        kept = np.column_stack([self.points, ratios])[~hidden]
        known = table(map(tuple, kept.tolist()))
        found = [known.at(*point).ratio for point in self.points[hidden].tolist()]
        return float(np.median(np.abs(np.array(found) / ratios[hidden] - 1)))

    def roofline(self) -> dict[str, float]:
        """Median error of the roofline by regime, and over all points."""
        errors = np.abs(self.model / self.seconds - 1)
        longest = np.maximum(self.computing, self.moving)
        launch = longest < LAUNCH_BOUND_S
        regimes = {
            "launch-bound": launch,
            "memory-bound": ~launch & (self.moving >= self.computing),
            "compute-bound": ~launch & (self.moving < self.computing),
            "all": np.ones(len(errors), dtype=bool),
        }
        return {name: float(np.median(errors[at])) for name, at in regimes.items() if at.any()}


def main() -> None:
    """Measure, print the table and, last, one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", default="a100_80g,h100_sxm,l40s,rtx_pro_6000")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    printed = Printed(
        title=f"Median relative error of kernels, vLLM's tables in bf16\n{machine()}, "
        f"commit {commit()}"
    )
    columns = ("gpu", "operator", "points", "left-out points", "left-out shapes", "roofline: all",
               "launch-bound", "memory-bound", "compute-bound")  # fmt: skip
    for column in columns:
        printed.add_column(column, justify="left" if column in columns[:2] else "right")
    figures: dict[str, dict[str, float]] = {}
    for gpu in options.gpus.split(","):
        for operator, smooth_s in operators(gpu):
            found = {
                f"profiled_{k}": v for k, v in operator.held_out(smooth_s, options.seed).items()
            }
            found |= {f"roofline_{k}": v for k, v in operator.roofline().items()}
            figures[f"{gpu} {operator.name}"] = found
            keys = ("profiled_points", "profiled_shapes", "roofline_all", "roofline_launch-bound",
                    "roofline_memory-bound", "roofline_compute-bound")  # fmt: skip
            cells = [f"{found[key]:.1%}" if key in found else "" for key in keys]
            printed.add_row(gpu, operator.name, f"{len(operator.seconds):,}", *cells)
    Console(width=150).print(printed)
    rounded = {
        name: {key: round(value, 4) for key, value in found.items()}
        for name, found in figures.items()
    }
    print(json.dumps(rounded))


def operators(gpu: str) -> list[tuple[Operator, Callable[..., float]]]:
    """The operators that are judged, each with the smooth model that its ratios are taken to."""
    part = load_gpu(gpu)
    model = KernelModel.of(part, part.peak.memory_bandwidth_bytes_per_s, "bf16")
    tables = open_tables(gpu, "vllm", None)
    smooth = replace(model, sm_count=None)
    found = [products(tables, model, smooth)]
    for phase, seconds in (("context", prompts), ("generation", decodes)):
        found.append(attention(tables, phase, model, smooth, seconds))
    return found


def products(
    tables: Silicon, model: KernelModel, smooth: KernelModel
) -> tuple[Operator, Callable[..., float]]:
    """Matrix products by (columns, depth, rows)."""

    def seconds(by: KernelModel, columns: float, depth: float, rows: float, cached: bool) -> float:
        moved = 2 * (rows * depth + depth * columns + rows * columns)
        return by.product_s(rows, int(columns), int(depth), moved, cached=cached)

    def ideal_s(columns: Rows, depth: Rows, rows: Rows) -> Rows:
        moved = 2 * (rows * depth + depth * columns + rows * columns)
        flops = 2 * rows * depth * columns
        return np.stack([flops / model.flops_per_s, moved / model.bytes_per_s])

    rows = fastest(tables.rows("gemm", "gemm", gemm_dtype="bfloat16"), ("n", "k", "m"))
    operator = Operator("gemm", rows, lambda *at: seconds(model, *at, True), ideal_s, 2)
    return operator, lambda *at: seconds(smooth, *at, False)


Seconds = Callable[[RooflineKernels, float, float, bool], float]


def attention(
    tables: Silicon, phase: str, model: KernelModel, smooth: KernelModel, seconds: Seconds
) -> tuple[Operator, Callable[..., float]]:
    """Attention by (query heads, KV heads, batch, length), heads of 128 elements, no window."""
    columns = dict(
        tables.rows("attention", f"{phase}_attention", kv_cache_dtype="bfloat16", head_dim=128,
                    window_size=0)
    )  # fmt: skip
    columns["length"] = columns["isl"] + (columns["step"] if phase == "generation" else 0)
    rows = fastest(columns, ("num_heads", "num_key_value_heads", "batch_size", "length"))
    layers: dict[tuple[float, float, KernelModel], RooflineKernels] = {}

    def layer(heads: float, kv_heads: float, by: KernelModel) -> RooflineKernels:
        key = (heads, kv_heads, by)
        if key not in layers:
            shape = one_layer(int(heads), int(kv_heads))
            layers[key] = RooflineKernels(shape, by, dtype_bytes=2, kv_dtype_bytes=2)
        return layers[key]

    def ideal_s(heads: Rows, kv_heads: Rows, batch: Rows, length: Rows) -> Rows:
        pairs = batch * length * ((length + 1) / 2 if phase == "context" else 1)
        tokens = batch * (length if phase == "context" else 1)
        moved = 2 * 128 * (tokens * 2 * heads + 2 * batch * length * kv_heads)
        return np.stack([4 * 128 * heads * pairs / model.flops_per_s, moved / model.bytes_per_s])

    def by_model(*at: float) -> float:
        return seconds(layer(at[0], at[1], model), at[2], at[3], True)

    def by_smooth(*at: float) -> float:
        return seconds(layer(at[0], at[1], smooth), at[2], at[3], False)

    return Operator(f"{phase} attention", rows, by_model, ideal_s, 3), by_smooth


def prompts(kernels: RooflineKernels, batch: float, length: float, cached: bool) -> float:
    """Attention of a batch of whole prompts."""
    shape = IterationShape.of([(int(length), 0)] * int(batch), (), 0)
    return kernels.prompts_s(shape, cached=cached)


def decodes(kernels: RooflineKernels, batch: float, length: float, cached: bool) -> float:
    """Attention of a batch of decoding requests."""
    return kernels.decodes_s(int(batch), batch * length, cached=cached)


def one_layer(heads: int, kv_heads: int) -> Architecture:
    """A model of one layer with such heads."""
    return replace(
        load_architecture("llama_3_8b"), num_layers=1, num_heads=heads, num_kv_heads=kv_heads
    )


if __name__ == "__main__":
    main()
