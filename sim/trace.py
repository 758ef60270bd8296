"""What happened: four tables of one schema, written by both panels.

`spans` (resource, operation, start_s, end_s, flops, bytes, request), `requests`, `iterations` and
`decisions`. Token times are never stored: a request keeps runs (iteration of its first token, tokens
that followed), and the times are looked up in the iterations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 1

PREFILL, DECODE = 1, 2
"""Bits of an iteration's kind; both: a mixed iteration."""


class State(IntEnum):
    """Changes of a request's state that its events record."""

    admitted = 1
    decoding = 2
    preempted = 3
    finished = 4


Array = NDArray[np.float64] | NDArray[np.int64]
Table = dict[str, Array]

ITERATIONS = {"replica": "i", "start_s": "f", "end_s": "f", "kind": "i"}
REQUESTS = {
    "request": "i", "arrival_s": "f", "prompt_tokens": "i", "output_tokens": "i",
    "max_output_tokens": "i",
}  # fmt: skip
EVENTS = {"request": "i", "instant_s": "f", "state": "i"}
RUNS = {"request": "i", "first_iteration": "i", "count": "i"}
SPANS = {"start_s": "f", "end_s": "f", "flops": "f", "bytes": "f", "request": "i"}
SPAN_NAMES = ("resource", "operation")
DECISIONS = {
    "replica": "i", "instant_s": "f", "repeat": "i", "free_blocks": "i", "waiting": "i",
    "context_tokens": "i", "prefill_tokens": "i", "prefill_pairs": "i", "prefill_context": "i",
    "num_prefills": "i", "num_decodes": "i", "decode_context": "i", "sampled_tokens": "i",
}  # fmt: skip
"""`free_blocks`, `waiting` and `context_tokens` (KV stored) were observed before the decision; the
columns after them are the shape of its first iteration: see `IterationShape`."""
RAGGED = ("admitted", "preempted", "prefilled", "prefilled_tokens", "joined", "left")
"""Lists of a decision. `joined` and `left`: changes of the set of decoding requests since the
decision before, from which the tokens of every request at every decision follow."""


@dataclass(frozen=True, slots=True)
class Ragged:
    """Lists of whole numbers, one a row: row i is `values[offsets[i]:offsets[i + 1]]`."""

    offsets: NDArray[np.int64]
    values: NDArray[np.int64]

    def row(self, index: int) -> list[int]:
        """The list at one row."""
        return self.values[self.offsets[index] : self.offsets[index + 1]].tolist()

    def counts(self) -> NDArray[np.int64]:
        """Length of each row's list."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Trace:
    """The four tables of one run as columns; `requests` with its events and runs beside it."""

    iterations: Mapping[str, Array]
    requests: Mapping[str, Array]
    events: Mapping[str, Array]
    """State changes in order of time."""
    runs: Mapping[str, Array]
    """Tokens of a stay on the replica: one at the end of `first_iteration`, then `count` more at
    the ends of the next `count` iterations that decode."""
    decisions: Mapping[str, Array]
    decision_lists: Mapping[str, Ragged]
    spans: Mapping[str, Array] = field(default_factory=lambda: empty(SPANS))
    span_names: Mapping[str, list[str]] = field(
        default_factory=lambda: {name: [] for name in SPAN_NAMES}
    )

    @property
    def num_iterations(self) -> int:
        """Iterations in the trace."""
        return len(self.iterations["start_s"])

    @property
    def num_decisions(self) -> int:
        """Decisions, repeats counted."""
        return int(self.decisions["repeat"].sum())

    def frame(self, table: str) -> pd.DataFrame:
        """One table as a pandas frame, lists as columns of lists.

        Args:
            table: iterations, requests, events, runs, decisions or spans.
        """
        import pandas as pd

        if table not in ("iterations", "requests", "events", "runs", "decisions", "spans"):
            raise ValueError(
                f"table={table!r} is not in a trace; "
                "take iterations, requests, events, runs, decisions or spans"
            )
        columns: dict[str, object] = dict(getattr(self, table))
        if table == "decisions":
            for name, ragged in self.decision_lists.items():
                columns[name] = np.split(ragged.values, ragged.offsets[1:-1]) or []
        if table == "spans":
            columns = {**self.span_names, **columns}
        return pd.DataFrame(columns)

    def save(self, folder: Path) -> None:
        """Write every table as Parquet into a folder, which is made."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        folder.mkdir(parents=True, exist_ok=True)
        stamp = {b"diptych_trace_schema": str(SCHEMA_VERSION).encode()}
        for name in ("iterations", "requests", "events", "runs", "decisions", "spans"):
            columns = {key: pa.array(value) for key, value in getattr(self, name).items()}
            if name == "decisions":
                for key, ragged in self.decision_lists.items():
                    columns[key] = pa.LargeListArray.from_arrays(ragged.offsets, ragged.values)
            if name == "spans":
                columns |= {key: pa.array(v, pa.string()) for key, v in self.span_names.items()}
            table = pa.table(columns).replace_schema_metadata(stamp)
            pq.write_table(table, folder / f"{name}.parquet")


def load_trace(folder: Path) -> Trace:
    """Read a trace that `Trace.save` wrote.

    Raises:
        ValueError: a table is missing, unreadable, or of another schema version.
    """
    tables: dict[str, Table] = {}
    lists: dict[str, Ragged] = {}
    names: dict[str, list[str]] = {}
    for name in ("iterations", "requests", "events", "runs", "decisions", "spans"):
        table = _read_table(folder / f"{name}.parquet")
        tables[name] = {}
        for key in table.column_names:
            column = table.column(key).combine_chunks()
            if key in RAGGED:
                lists[key] = Ragged(
                    column.offsets.to_numpy().astype(np.int64), column.values.to_numpy()
                )
            elif key in SPAN_NAMES:
                names[key] = column.to_pylist()
            else:
                tables[name][key] = column.to_numpy()
    return Trace(**tables, decision_lists=lists, span_names=names)


def _read_table(path: Path):  # pyarrow has no types
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is not a readable trace table ({error}); run the study again"
        ) from error
    version = (table.schema.metadata or {}).get(b"diptych_trace_schema", b"none").decode()
    if version != str(SCHEMA_VERSION):
        raise ValueError(
            f"{path} has trace schema {version}, this release reads {SCHEMA_VERSION}; "
            "run the study again"
        )
    return table


def empty(columns: Mapping[str, str]) -> Table:
    """A table without rows."""
    return {name: np.zeros(0, np.float64 if kind == "f" else np.int64)
            for name, kind in columns.items()}  # fmt: skip
