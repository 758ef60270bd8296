# pyright: basic
"""Traces as Parquet files and pandas frames. Both libraries come without complete types."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sim.trace import RAGGED, SCHEMA_VERSION, SPAN_NAMES, Array, Ragged, Table, Trace

if TYPE_CHECKING:
    import pandas as pd

TABLES = (
    "iterations", "requests", "events", "runs", "decisions", "spans", "routes", "answers",
    "hand_overs", "searches", "stages", "lookups", "moves", "steps", "members", "kv_moves",
)  # fmt: skip
STAMP = b"diptych_trace_schema"


def trace_frame(trace: Trace, table: str) -> pd.DataFrame:
    """One table as a pandas frame, lists as columns of lists.

    Raises:
        ValueError: there is no such table.
    """
    import pandas as pd

    if table not in TABLES:
        raise ValueError(f"table={table!r} is not in a trace; take one of {', '.join(TABLES)}")
    columns: dict[str, object] = dict(getattr(trace, table))
    if table == "decisions":
        for name, ragged in trace.decision_lists.items():
            columns[name] = [ragged.row(index) for index in range(len(ragged.offsets) - 1)]
    if table == "spans":
        columns = {**trace.span_names, **columns}
    return pd.DataFrame(columns)


def save_trace(trace: Trace, folder: Path) -> None:
    """Write every table as Parquet, stamped with the schema's version, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TABLES:
        columns = {key: _column(values) for key, values in getattr(trace, name).items()}
        if name == "decisions":
            for key, ragged in trace.decision_lists.items():
                columns[key] = pa.LargeListArray.from_arrays(
                    _column(ragged.offsets), _column(ragged.values)
                )
        if name == "spans":
            columns |= {
                key: pa.array(value, pa.string()) for key, value in trace.span_names.items()
            }
        table = pa.table(columns).replace_schema_metadata({STAMP: str(SCHEMA_VERSION).encode()})
        _write(table, folder / f"{name}.parquet")


def write_columns(columns: Mapping[str, Array], path: Path) -> None:
    """Write a table of numbers as Parquet."""
    _write(pa.table({key: _column(values) for key, values in columns.items()}), path)


def _write(table: pa.Table, path: Path) -> None:
    # Instants hardly repeat: a dictionary of them only takes memory.
    pq.write_table(table, path, use_dictionary=False)


def _column(values: Array) -> pa.Array:
    """An Arrow array over the same memory; `pa.array` would import all of pandas first."""
    kind = pa.float64() if values.dtype == np.float64 else pa.int64()
    held = np.ascontiguousarray(values, np.float64 if kind == pa.float64() else np.int64)
    return pa.Array.from_buffers(kind, len(held), [None, pa.py_buffer(held)])


def load_trace(folder: Path) -> Trace:
    """Read a trace that `save_trace` wrote.

    Raises:
        ValueError: a table is missing, unreadable, or of another schema version.
    """
    tables: dict[str, Table] = {}
    lists: dict[str, Ragged] = {}
    names: dict[str, list[str]] = {}
    for name in TABLES:
        table = _read_table(folder / f"{name}.parquet")
        tables[name] = {}
        for key in table.column_names:
            column = table.column(key).combine_chunks()
            if key in RAGGED:
                offsets = column.offsets.to_numpy().astype(np.int64)
                lists[key] = Ragged(offsets, column.values.to_numpy())
            elif key in SPAN_NAMES:
                names[key] = column.to_pylist()
            else:
                tables[name][key] = column.to_numpy()
    return Trace(**tables, decision_lists=lists, span_names=names)


def _read_table(path: Path) -> pa.Table:
    try:
        table = pq.read_table(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is not a readable trace table ({error}); run the study again"
        ) from error
    version = (table.schema.metadata or {}).get(STAMP, b"none").decode()
    if version != str(SCHEMA_VERSION):
        raise ValueError(
            f"{path} has trace schema {version}, this release reads {SCHEMA_VERSION}; "
            "run the study again"
        )
    return table
