"""How far off are single kernels: measured tables between their points, and the datasheet roofline?

Tables: every fifth point is left out at random and asked for, and separately every fifth shape as a
whole (matrix of a product, heads and batch of attention); what ratios are taken to is told the rest
alone. Roofline: against all points of NVIDIA's tables, by
what bounds the kernel. The tables time a kernel over and over, so operands that fit the cache are
read from there; the roofline is told so.

    python benchmarks/operators.py [--gpus a100_80g,h100_sxm,l40s,rtx_pro_6000] [--seed 0]
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table as Printed

from hardware_models.parts import load_gpu
from sim.costs.attention_scale import AttentionScale, shortest_s
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
Scale = Callable[..., float]
"""Seconds, of coordinates, that ratios of measurements are taken to."""


@dataclass(kw_only=True)
class Operator:
    """Measured points of one operator on one GPU, and what the roofline says of each."""

    name: str
    rows: Rows
    """Coordinates, outermost axis first, and seconds."""
    model_s: Callable[..., float]
    """Seconds by the roofline, of coordinates."""
    ideal_s: Callable[..., Rows]
    """Seconds of computing and of moving at the peaks, of columns of coordinates."""
    scale_of: Callable[[Rows], Scale]
    """What ratios are taken to, given the measurements that are known."""
    shape_axes: int
    """Leading axes that make up a shape, left out as a whole."""
    by_total: bool = False
    """The table's last axis is the product of the last two coordinates."""

    def __post_init__(self) -> None:
        self.points, self.seconds = self.rows[:, :-1], self.rows[:, -1]
        self.at = self.points.copy()
        if self.by_total:
            self.at[:, -1] *= self.at[:, -2]

    def held_out(self, seed: int) -> dict[str, float]:
        """Median error of points and of shapes that the table was not given."""
        rng = np.random.default_rng(seed)
        drawn = rng.random(len(self.seconds)) < 0.2
        shapes, of = np.unique(self.points[:, : self.shape_axes], axis=0, return_inverse=True)
        out = {
            "points": drawn,
            "shapes": (rng.random(len(shapes)) < 0.2)[of.ravel()],
        }
        return {what: self._error(hidden) for what, hidden in out.items()}

    def _error(self, hidden: NDArray[np.bool_]) -> float:
        scale = self.scale_of(self.seconds[~hidden])
        ratios = self.seconds / np.array([scale(*point) for point in self.points.tolist()])
        kept = np.column_stack([self.at, ratios])[~hidden]
        known = table(map(tuple, kept.tolist()))
        found = [known.at(*point).ratio for point in self.at[hidden].tolist()]
        return float(np.median(np.abs(np.array(found) / ratios[hidden] - 1)))

    def roofline(self) -> dict[str, float]:
        """Median error of the roofline by regime, and over all points."""
        model = np.array([self.model_s(*point) for point in self.points.tolist()])
        errors = np.abs(model / self.seconds - 1)
        computing, moving = self.ideal_s(*self.points.T)
        longest = np.maximum(computing, moving)
        launch = longest < LAUNCH_BOUND_S
        regimes = {
            "launch-bound": launch,
            "memory-bound": ~launch & (moving >= computing),
            "compute-bound": ~launch & (moving < computing),
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
        for operator in operators(gpu):
            found = {f"profiled_{k}": v for k, v in operator.held_out(options.seed).items()}
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


def operators(gpu: str) -> list[Operator]:
    """The operators that are judged."""
    part = load_gpu(gpu)
    model = KernelModel.of(part, part.peak.memory_bandwidth_bytes_per_s, "bf16")
    tables = open_tables(gpu, "vllm", None)
    phases = ("context", "generation")
    return [products(tables, model), *(attention(tables, phase, model) for phase in phases)]


def products(tables: Silicon, model: KernelModel) -> Operator:
    """Matrix products by (columns, depth, rows)."""
    smooth = replace(model, sm_count=None)

    def seconds(by: KernelModel, columns: float, depth: float, rows: float, cached: bool) -> float:
        moved = 2 * (rows * depth + depth * columns + rows * columns)
        return by.product_s(rows, int(columns), int(depth), moved, cached=cached)

    def ideal_s(columns: Rows, depth: Rows, rows: Rows) -> Rows:
        moved = 2 * (rows * depth + depth * columns + rows * columns)
        flops = 2 * rows * depth * columns
        return np.stack([flops / model.flops_per_s, moved / model.bytes_per_s])

    rows = fastest(tables.rows("gemm", "gemm", gemm_dtype="bfloat16"), ("n", "k", "m"))
    return Operator(
        name="gemm",
        rows=rows,
        model_s=lambda *at: seconds(model, *at, True),
        ideal_s=ideal_s,
        scale_of=lambda _: lambda *at: seconds(smooth, *at, False),
        shape_axes=2,
    )


def attention(tables: Silicon, phase: str, model: KernelModel) -> Operator:
    """Attention by (query heads, KV heads, batch, length), heads of 128 elements, no window."""
    context = phase == "context"
    columns = dict(
        tables.rows("attention", f"{phase}_attention", kv_cache_dtype="bfloat16", head_dim=128,
                    window_size=0)
    )  # fmt: skip
    columns["length"] = columns["isl"] + (0 if context else columns["step"])
    rows = fastest(columns, ("num_heads", "num_key_value_heads", "batch_size", "length"))
    layers = {
        heads: RooflineKernels(one_layer(*heads), model, dtype_bytes=2, kv_dtype_bytes=2)
        for heads in {(int(one), int(other)) for one, other in rows[:, :2].tolist()}
    }

    def ideal_s(heads: Rows, kv_heads: Rows, batch: Rows, length: Rows) -> Rows:
        pairs = batch * length * ((length + 1) / 2 if context else 1)
        tokens = batch * (length if context else 1)
        moved = 2 * 128 * (tokens * 2 * heads + 2 * batch * length * kv_heads)
        return np.stack([4 * 128 * heads * pairs / model.flops_per_s, moved / model.bytes_per_s])

    def by_model(heads: float, kv_heads: float, batch: float, length: float) -> float:
        kernels = layers[int(heads), int(kv_heads)]
        if context:
            return kernels.prompts_s(prompts(batch, length), cached=True)
        return kernels.decodes_s(int(batch), batch * length, cached=True)

    return Operator(
        name=f"{phase} attention",
        rows=rows,
        model_s=by_model,
        ideal_s=ideal_s,
        scale_of=lambda known: attention_scale(layers, shortest_s(known), context=context),
        shape_axes=3,
        by_total=not context,
    )


def attention_scale(
    layers: dict[tuple[int, int], RooflineKernels], launch_s: float, *, context: bool
) -> Scale:
    """What attention of such heads is taken to, by the launch that is known of it."""
    scales = {heads: AttentionScale(kernels, launch_s) for heads, kernels in layers.items()}

    def scale(heads: float, kv_heads: float, batch: float, length: float) -> float:
        mine = scales[int(heads), int(kv_heads)]
        if context:
            return mine.prompts_s(prompts(batch, length))
        return mine.decodes_s(batch, batch * length)

    return scale


def prompts(batch: float, length: float) -> IterationShape:
    """A batch of whole prompts."""
    return IterationShape.of([(int(length), 0)] * int(batch), (), 0)


def one_layer(heads: int, kv_heads: int) -> Architecture:
    """A model of one layer with such heads."""
    return replace(
        load_architecture("llama_3_8b"), num_layers=1, num_heads=heads, num_kv_heads=kv_heads
    )


if __name__ == "__main__":
    main()
