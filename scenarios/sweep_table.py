"""The table of a sweep: a row a point, sorted by configuration, the same bytes from any launcher.

`sweep.csv` holds what the points chose, their errors and figures. `sweep.parquet` holds beside
these the full configuration of every point, in columns that begin with `scenario.`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scenarios.compare import flatten
from scenarios.rows import PARQUET, TABLE, Row, union
from sim.files import whole_file

if TYPE_CHECKING:
    import pyarrow as pa

SCENARIO = "scenario."


def write(
    found: Sequence[Row], root: Path, added: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Write both files, each complete or not at all.

    Args:
        found: rows, in the order of the table.
        root: folder of the sweep.
        added: further columns of text, a value a row.
    """
    texts = _texts(found) | dict(added or {})
    figures = {
        name: [row["figures"].get(name) for row in found]
        for name in union(row["figures"] for row in found)
    }
    with whole_file(root / TABLE) as building, building.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*texts, *figures])
        for place in range(len(found)):
            words = [column[place] or "" for column in texts.values()]
            numbers = [column[place] for column in figures.values()]
            writer.writerow([*words, *("" if v is None else repr(float(v)) for v in numbers)])
    _write_parquet(found, root, texts, figures)


def _texts(found: Sequence[Row]) -> dict[str, Sequence[str | None]]:
    keys = union(row["choices"] for row in found)
    columns: dict[str, Sequence[str | None]] = {
        key: [row["choices"].get(key) for row in found] for key in keys
    }
    return columns | {"error": [row["error"] for row in found]}


def _write_parquet(
    found: Sequence[Row],
    root: Path,
    texts: Mapping[str, Sequence[str | None]],
    figures: Mapping[str, Sequence[float | None]],
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {key: pa.array(texts[key], pa.string()) for key in texts}
    for name, values in figures.items():
        known = [None if value is None else float(value) for value in values]
        columns[name] = pa.array(known, pa.float64())
    leaves = [flatten(row["configuration"], SCENARIO) for row in found]
    for key in sorted(union(leaves)):
        columns[key] = _typed([one.get(key) for one in leaves])
    with whole_file(root / PARQUET) as building:
        pq.write_table(pa.table(columns), building)


def _typed(values: Sequence[Any]) -> pa.Array:
    """A column of the one type that all values have; lists and mixed values as JSON text."""
    import pyarrow as pa

    kinds = {type(value) for value in values if value is not None}
    if kinds == {bool}:
        return pa.array(values, pa.bool_())
    if kinds == {int} and all(abs(value) < 2**63 for value in values if value is not None):
        return pa.array(values, pa.int64())
    if kinds and kinds <= {int, float}:
        return pa.array([None if v is None else float(v) for v in values], pa.float64())
    if kinds <= {str}:
        return pa.array(values, pa.string())
    return pa.array([None if v is None else json.dumps(v) for v in values], pa.string())
