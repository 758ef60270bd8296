"""Reads measured collectives from CSV files as APEX and Vidur write them, one file an operation.

APEX's size is in KiB and its time in microseconds; Vidur's size is in bytes, its times in
milliseconds.
"""

import csv
import math
from collections.abc import Iterator
from pathlib import Path

from sim.costs.collective_tables import Measured

OPERATIONS = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "sendrecv": "send_recv",
    "send_recv": "send_recv",
}
"""Name of a file, or of an operation in a table -> ours."""


def read_apex(folder: Path) -> list[Measured]:
    """The rows of a folder of nccl-tests results with columns size(kb) and time(us).

    The size is rounded down to KiB there, so rows of size 0 say nothing and are left out.

    Raises:
        ValueError: there is no file, a column is missing, or a cell is not what it should be.
    """
    rows: list[Measured] = []
    for file in _files(folder):
        for line, place in _lines(file):
            size_kib = _number(line, "size(kb)", place)
            nodes = int(_number(line, "num_nodes", place, least=1))
            per_node = int(_number(line, "num_gpus_per_node", place, least=1))
            seconds = _number(line, "time(us)", place) * 1e-6
            dtype = _cell(line, "dtype", place)
            if size_kib > 0:
                where = (OPERATIONS[file.stem], dtype, nodes * per_node, nodes)
                rows.append(Measured(*where, 1024 * size_kib, seconds))
    return rows


def read_vidur(folder: Path) -> list[Measured]:
    """The rows of a folder of Vidur's network profiles, fp16; the median of each row counts.

    Raises:
        ValueError: there is no file, a column is missing, or a cell is not what it should be.
    """
    rows: list[Measured] = []
    for file in _files(folder):
        for line, place in _lines(file):
            ranks = int(_number(line, "num_workers", place, least=1))
            nodes = -(-ranks // int(_number(line, "devices_per_node", place, least=1)))
            seconds = _number(line, f"time_stats.{file.stem}.median", place) * 1e-3
            where = (OPERATIONS[file.stem], "half", ranks, nodes)
            rows.append(Measured(*where, _number(line, "size", place), seconds))
    return rows


def _files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.csv"))
    if not files:
        raise ValueError(f"{folder} holds no .csv file; name the folder of one GPU's collectives")
    for file in files:
        if file.stem not in OPERATIONS:
            raise ValueError(
                f"{file}: the name of a file says its operation; use one of {', '.join(OPERATIONS)}"
            )
    return files


def _lines(file: Path) -> Iterator[tuple[dict[str, str], str]]:
    """Every line with its place, for messages."""
    with file.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        for line in reader:
            yield line, f"{file}, line {reader.line_num}"


def _cell(line: dict[str, str], column: str, place: str) -> str:
    if column not in line:
        raise ValueError(f"{place}: no column {column!r}; there are: {', '.join(map(str, line))}")
    if not line[column]:
        raise ValueError(f"{place}: {column} is empty; complete the line or drop it")
    return line[column]


def _number(line: dict[str, str], column: str, place: str, least: float = 0) -> float:
    text = _cell(line, column, place)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not least <= number < math.inf:
        raise ValueError(f"{place}: {column}={text!r} must be a finite number of {least} or more")
    return number
