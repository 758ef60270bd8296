"""Matrix products from a table of (columns, depth, rows): exact, between its points, or beyond."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from sim.costs.kernel_model import KernelModel
from sim.costs.seconds import Seconds
from sim.costs.table import Table, table

Rows = NDArray[np.float64]


class MeasuredProducts:
    """Seconds of products whose weights come from memory, as they do once a layer and iteration.

    A benchmark runs one product over and over, so small weights stay in the cache. What is faster
    than `floor_bytes_per_s` allows is counted as long as reading the weights takes.
    """

    def __init__(
        self, measured: Rows, shapes: set[tuple[int, int]], model: KernelModel, *,
        dtype_bytes: int, floor_bytes_per_s: float,
    ) -> None:  # fmt: skip
        """Take the table.

        Args:
            measured: rows of (columns, depth, rows, seconds).
            shapes: the (columns, depth) that will be asked for; only what lies around is kept.
            model: of the device. Tiles are left out: the table has them, and ratios get smoother.
            dtype_bytes: bytes of an element of every operand.
            floor_bytes_per_s: what the memory delivers.
        """
        self.model = replace(model, sm_count=None)
        self.dtype_bytes = dtype_bytes
        self.floor_bytes_per_s = floor_bytes_per_s
        kept = _around(measured, shapes)
        self.table: Table = table(
            (columns, depth, rows, self._ratio(columns, depth, rows, seconds))
            for columns, depth, rows, seconds in kept
        )

    def product(self, columns: int, depth: int, rows: float) -> Seconds:
        """Seconds of (rows x depth) times (depth x columns)."""
        return self.table.at(columns, depth, rows).seconds(self._model_s(columns, depth, rows))

    def _model_s(self, columns: float, depth: float, rows: float) -> float:
        elements = rows * depth + depth * columns + rows * columns
        return self.model.product_s(rows, int(columns), int(depth), elements * self.dtype_bytes)

    def _ratio(self, columns: float, depth: float, rows: float, seconds: float) -> float:
        reading_s = columns * depth * self.dtype_bytes / self.floor_bytes_per_s
        return max(seconds, reading_s) / self._model_s(columns, depth, rows)


def _around(measured: Rows, shapes: set[tuple[int, int]]) -> list[list[float]]:
    """The rows between which the shapes lie: of each the columns next to it, and their depths."""
    kept: set[tuple[float, float]] = set()
    for columns, depth in shapes:
        for near in _neighbours(measured[:, 0], columns):
            depths = measured[measured[:, 0] == near, 1]
            kept |= {(near, one) for one in _neighbours(depths, depth)}
    return [row for row in measured.tolist() if (row[0], row[1]) in kept]


def _neighbours(values: Rows, wanted: float) -> set[float]:
    known = np.unique(values)
    at = int(np.searchsorted(known, wanted))
    if at < len(known) and known[at] == wanted:
        return {wanted}
    return {float(known[i]) for i in (at - 1, at) if 0 <= i < len(known)}
