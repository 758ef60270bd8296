"""NVIDIA's measured operator tables, read from the installed package `aiconfigurator-core`.

One Parquet file an operator, by GPU, serving framework and version. Latencies are in milliseconds.
Where several kernels measured the same point, the fastest counts: an engine chooses its backend by
measuring.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from hardware_models.names import alternatives
from sim.costs.collective_silicon import SYSTEMS, silicon_folder

DTYPES = {"bf16": "bfloat16", "fp8": "fp8"}
"""Our names of element types and the tables'."""
MILLISECOND_S = 1e-3

Columns = Mapping[str, NDArray[Any]]


class Silicon(NamedTuple):
    """The tables of one GPU as one framework's version measured them."""

    folder: Path
    gpu: str
    framework: str
    version: str | None
    """Asked for; None: the newest of each operator."""

    def version_of(self, operator: str) -> str:
        """The version whose table of an operator is read.

        Raises:
            ValueError: the operator, framework or version is not there; says what is.
        """
        folder = self.folder / operator / self.framework
        known = sorted((path.name for path in folder.glob("*")), key=_order)
        if not known:
            others = sorted(path.name for path in (self.folder / operator).glob("*"))
            raise ValueError(
                f"engine.framework={self.framework} has no {operator} table of {self.gpu}; "
                f"{alternatives(self.framework, others)}"
            )
        if self.version is None:
            return known[-1]
        if self.version not in known:
            raise ValueError(
                f"engine.framework_version={self.version} has no {operator} table of "
                f"{self.framework} on {self.gpu}; {alternatives(self.version, known)}; "
                "null takes the newest"
            )
        return self.version

    def rows(self, operator: str, file: str, **wanted: object) -> Columns:
        """Columns of the rows that have the wanted values; `latency` is in milliseconds.

        Raises:
            ValueError: there is no such table.
        """
        path = self.folder / operator / self.framework / self.version_of(operator)
        path /= f"{file}_perf.parquet"
        if not path.is_file():
            raise ValueError(
                f"there is no {file} table of {self.framework} on {self.gpu} in "
                f"aiconfigurator-core; take another framework or cost=roofline"
            )
        columns = _read(path)
        keep = np.ones(len(columns["latency"]), dtype=bool)
        for name, value in wanted.items():
            if name in columns:
                keep &= columns[name] == value
        return {name: values[keep] for name, values in columns.items()}


def open_tables(gpu: str, framework: str, version: str | None) -> Silicon:
    """The tables of a GPU.

    Raises:
        ValueError: the package is not installed, or has nothing for this GPU; says what there is.
    """
    systems = silicon_folder()
    folder = systems / SYSTEMS.get(gpu, gpu)
    if not any(folder.glob("gemm/*/*/*.parquet")):
        known = sorted(path.parents[2].parent.name for path in systems.glob("*/gemm/*/*/*.parquet"))
        names = {system: ours for ours, system in SYSTEMS.items()}
        there = sorted({names.get(system, system) for system in known})
        raise ValueError(f"gpu={gpu} has no measured tables; {alternatives(gpu, there)}")
    return Silicon(folder, gpu, framework, version)


def table_dtype(dtype: str, use: str) -> str:
    """The tables' name of an element type.

    Raises:
        ValueError: nothing was measured in it.
    """
    if dtype not in DTYPES:
        raise ValueError(
            f"{use}={dtype} has no measurements; {alternatives(dtype, list(DTYPES))}, or take "
            "cost=roofline"
        )
    return DTYPES[dtype]


def fastest(columns: Columns, axes: Sequence[str]) -> NDArray[np.float64]:
    """Rows of (coordinates, seconds), each point once with its shortest time."""
    points = np.stack([columns[axis].astype(np.float64) for axis in axes], axis=1)
    seconds = columns["latency"].astype(np.float64) * MILLISECOND_S
    order = np.lexsort((seconds, *points.T[::-1]))
    points, seconds = points[order], seconds[order]
    first = np.ones(len(points), dtype=bool)
    first[1:] = (points[1:] != points[:-1]).any(axis=1)
    return np.column_stack([points[first], seconds[first]])


@lru_cache(maxsize=16)
def _read(path: Path) -> Columns:
    # Here and not above: runs without tables need no Parquet.
    from pyarrow import parquet  # pyright: ignore[reportMissingTypeStubs]

    table: Any = cast(Any, parquet).read_table(path)
    return {name: table[name].to_numpy() for name in table.column_names}


def _order(version: str) -> list[tuple[int, str]]:
    """Versions in the order of their numbers, release candidates before the release."""
    parts = re.findall(r"\d+|[a-z]+", version)
    order = [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
    return [*order, (0, "")]
