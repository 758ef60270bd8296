# pyright: basic
"""Choices of a real router as a Parquet file; whatever is wrong is named by file and row.

A row is a token in a layer: whole numbers `layer`, `request` and `position`, and a list
`expert_ids`. Layers are counted from 0 among those that have experts. Rows may come in any order
and are counted from 1. pyarrow comes without complete types.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.files import whole_file
from sim.workload.token_routing.base import Tokens

KEYS = ("layer", "request", "position")
COLUMNS = (*KEYS, "expert_ids")
MOST = 2**31 - 1
"""A larger number of a request or a position is a mistake."""
MOST_LAYER = 9_999
"""A later layer is one, too."""

Whole = NDArray[np.int64]


class Choices(NamedTuple):
    """The rows of a file, by layer and then by token."""

    tokens: Whole
    """A request's number times 2**31, plus the position."""
    expert_ids: NDArray[np.int32]
    """[rows, top_k]."""
    starts: Whole
    """Where each layer begins, from 0 to the last that has rows, and the end [layers + 1]."""

    def of_layer(self, layer: int) -> slice:
        """The rows of a layer, which may be none."""
        known = layer < len(self.starts) - 1
        return slice(*self.starts[layer : layer + 2].tolist()) if known else slice(0, 0)


def write_choices(
    path: Path, tokens: Tokens, layers: Whole, expert_ids: NDArray[np.integer]
) -> None:
    """Write what `recorded` reads: complete or not at all.

    Args:
        path: the file; it takes its name when all is written.
        tokens: of each row.
        layers: of each row.
        expert_ids: that the token chose in the layer [rows, top_k].

    Raises:
        ValueError: the columns differ in length.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    lengths = [len(tokens.request_ids), len(tokens.positions), len(layers), len(expert_ids)]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"requests, positions, layers and expert_ids have {lengths} rows and must have equally "
            "many; give all four for every token in every layer"
        )
    num_rows, top_k = expert_ids.shape
    lists = pa.LargeListArray.from_arrays(
        pa.array(np.arange(num_rows + 1, dtype=np.int64) * top_k),
        pa.array(np.ascontiguousarray(expert_ids, np.int32).ravel()),
    )
    keys = (layers, *tokens)
    columns = {name: pa.array(np.asarray(key)) for name, key in zip(KEYS, keys, strict=True)}
    with whole_file(path) as building:
        pq.write_table(pa.table({**columns, "expert_ids": lists}), building)


def read_choices(path: str, num_experts: int, top_k: int) -> Choices:
    """Read and check a file.

    Raises:
        ValueError: it cannot be read, a column is missing or of another type, or a row is broken.
    """
    columns = _columns(path)
    keys = [
        _whole(path, name, columns[name], MOST_LAYER if name == "layer" else MOST) for name in KEYS
    ]
    expert_ids = _expert_ids(path, columns["expert_ids"], num_experts, top_k)
    layers, tokens = keys[0], keys[1] * (MOST + 1) + keys[2]
    order = np.lexsort((tokens, layers))
    layers, tokens = layers[order], tokens[order]
    again = np.flatnonzero((layers[1:] == layers[:-1]) & (tokens[1:] == tokens[:-1]))
    if len(again):
        first, second = order[again[0]], order[again[0] + 1]
        shown = ", ".join(f"{name} {key[first]}" for name, key in zip(KEYS, keys, strict=True))
        raise _broken(path, int(second), f"{shown} is in row {first + 1} too", "remove one of them")
    starts = np.searchsorted(layers, np.arange(int(layers[-1]) + 2))
    return Choices(tokens, expert_ids[order], starts)


def _columns(path: str) -> dict:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(Path(path).expanduser()).read()
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"path={path} must be a readable Parquet file but is not ({reason}); correct the path"
        ) from error
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise ValueError(
            f"{path}: lacks the columns {missing} and has {table.column_names}; it must have "
            f"{list(COLUMNS)}; write it with sim.workload.token_routing.choices_file"
        )
    if not table.num_rows:
        raise ValueError(f"{path}: has 0 rows and must have some; record the file again")
    return {name: table.column(name).combine_chunks() for name in COLUMNS}


def _whole(path: str, name: str, column, most: int) -> Whole:
    import pyarrow as pa

    if not pa.types.is_integer(column.type):
        raise ValueError(
            f"{path}: column {name} holds {column.type} and must hold whole numbers; convert it"
        )
    _refuse_nulls(path, name, column)
    values = column.to_numpy()
    wrong = np.flatnonzero((values < 0) | (values > most))
    if len(wrong):
        at = int(wrong[0])
        raise _broken(path, at, f"{name}={values[at]} must be from 0 to {most}", "correct the row")
    return values.astype(np.int64)


def _expert_ids(path: str, column, num_experts: int, top_k: int) -> NDArray[np.int32]:
    import pyarrow as pa

    kind = column.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not (lists or pa.types.is_fixed_size_list(kind)) or not pa.types.is_integer(kind.value_type):
        raise ValueError(
            f"{path}: column expert_ids holds {kind} and must hold lists of whole numbers; "
            "convert it"
        )
    _refuse_nulls(path, "expert_ids", column)
    lengths = _lengths(column)
    wrong = np.flatnonzero(lengths != top_k)
    if len(wrong):
        at = int(wrong[0])
        problem = f"expert_ids holds {lengths[at]} experts and the model chooses top_k={top_k}"
        raise _broken(path, at, problem, "choose the model that was recorded")
    flat = column.flatten()
    if flat.null_count:
        at = int(np.flatnonzero(flat.is_null().to_numpy(zero_copy_only=False))[0]) // top_k
        raise _broken(path, at, "expert_ids holds a null", "correct the row")
    return _known(path, flat.to_numpy().reshape(-1, top_k), num_experts)


def _lengths(lists) -> Whole:
    import pyarrow.compute as pc

    measure = getattr(pc, "list_value_length")  # noqa: B009  made at run time: no type names it
    return measure(lists).to_numpy()


def _known(path: str, ids: NDArray[np.integer], num_experts: int) -> NDArray[np.int32]:
    wrong = np.flatnonzero(((ids < 0) | (ids >= num_experts)).any(axis=1))
    if len(wrong):
        at = int(wrong[0])
        problem = (
            f"expert_ids={ids[at].tolist()} must be from 0 to {num_experts - 1}, the experts of "
            "the model"
        )
        raise _broken(path, at, problem, "choose the model that was recorded")
    ranked = np.sort(ids, axis=1)
    twice = np.flatnonzero((ranked[:, 1:] == ranked[:, :-1]).any(axis=1))
    if len(twice):
        at = int(twice[0])
        problem = f"expert_ids={ids[at].tolist()} must be distinct"
        raise _broken(path, at, problem, "correct the row")
    return ids.astype(np.int32)


def _refuse_nulls(path: str, name: str, column) -> None:
    if column.null_count:
        at = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise _broken(path, at, f"{name} is null", "correct or remove the row")


def _broken(path: str, row: int, problem: str, way_out: str) -> ValueError:
    return ValueError(f"{path}: row {row + 1}: {problem}; {way_out}")
