"""Choices of a real router: what was written is read back, and every broken row is named."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.workload.token_routing.base import Tokens, checked_expert_ids
from sim.workload.token_routing.choices_file import write_choices
from sim.workload.token_routing.recorded import Recorded
from sim.workload.token_routing.skewed import Skewed

ROWS = {
    "layer": [1, 0, 0, 1],
    "request": [0, 0, 7, 7],
    "position": [3, 3, 0, 0],
    "expert_ids": [[2, 0], [1, 2], [0, 2], [0, 1]],
}


def _file(folder: Path, columns: dict[str, Any]) -> Recorded:
    pq.write_table(pa.table(columns), folder / "gate.parquet")
    return Recorded(path=str(folder / "gate.parquet"))


def _ask(routing: Recorded, layer: int, request: int, position: int) -> list[list[int]]:
    tokens = Tokens(np.array([request]), np.array([position]))
    return checked_expert_ids(routing, 0, layer, tokens, 3, 2).tolist()


@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.int64()), pa.large_list(pa.int32()), pa.list_(pa.uint8(), 2)],
    ids=["list", "large", "fixed"],
)
def test_any_list_of_whole_numbers_is_read(kind: pa.DataType, tmp_path: Path) -> None:
    routing = _file(tmp_path, {**ROWS, "expert_ids": pa.array(ROWS["expert_ids"], kind)})
    assert _ask(routing, 1, 0, 3) == [[2, 0]]
    both = Tokens(np.array([7, 0, 7]), np.array([0, 3, 0]))
    found = routing.expert_ids(0, 0, both, 3, 2)
    assert (found.tolist(), found.dtype) == ([[0, 2], [1, 2], [0, 2]], np.int32)
    assert routing.expert_ids(0, 0, Tokens(both[0][:0], both[1][:0]), 3, 2).shape == (0, 2)


@given(
    keys=st.sets(
        st.tuples(st.integers(0, 3), st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1)),
        min_size=1, max_size=20,
    ),
    data=st.data(),
)  # fmt: skip
def test_any_rows_come_back(
    keys: set[tuple[int, int, int]], data: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    layers, requests, positions = np.array(sorted(keys, key=hash)).T
    ids = np.array([data.draw(st.permutations(range(5)))[:3] for _ in layers])
    path = tmp_path_factory.mktemp("rows") / "gate.parquet"
    write_choices(path, Tokens(requests, positions), layers, ids)
    routing = Recorded(path=str(path))
    for layer in set(layers.tolist()):
        mine = layers == layer
        tokens = Tokens(requests[mine], positions[mine])
        np.testing.assert_array_equal(routing.expert_ids(0, layer, tokens, 5, 3), ids[mine])


def test_a_drawn_routing_written_down_is_the_same_routing(tmp_path: Path) -> None:
    drawn, count, layers = Skewed(skew=1.2), 500, 3
    tokens = Tokens(np.arange(count) % 9, np.arange(count) // 9)
    ids = [drawn.expert_ids(2, layer, tokens, 16, 4) for layer in range(layers)]
    every = Tokens(*(np.tile(column, layers) for column in tokens))
    write_choices(
        tmp_path / "gate.parquet", every, np.repeat(np.arange(layers), count), np.concatenate(ids)
    )
    replay = Recorded(path=str(tmp_path / "gate.parquet"))
    for layer, wanted in enumerate(ids):
        np.testing.assert_array_equal(replay.expert_ids(0, layer, tokens, 16, 4), wanted)
    counts = [np.bincount(one.ravel(), minlength=16) / one.size for one in ids]
    np.testing.assert_allclose(replay.loads(0, layers, 16, 4), counts)
    assert [path.name for path in tmp_path.iterdir()] == ["gate.parquet"]


def test_a_file_that_was_written_again_is_read_again(tmp_path: Path) -> None:
    routing = _file(tmp_path, ROWS)
    assert _ask(routing, 0, 7, 0) == [[0, 2]]
    _file(tmp_path, {**ROWS, "expert_ids": [[2, 0], [1, 2], [1, 0], [0, 1]]})
    os.utime(routing.path, ns=(1, 1))  # two writes may fall into one tick of the clock
    assert _ask(routing, 0, 7, 0) == [[1, 0]]


def test_a_token_that_was_not_recorded_is_named(tmp_path: Path) -> None:
    routing = _file(tmp_path, ROWS)
    missing = [(0, 7, 1), (0, 1, 0), (2, 0, 3), (0, 8, 0), (0, 2**31, 0), (0, 6, 2**31)]
    for layer, request, position in missing:
        named = (
            rf"gate\.parquet: request {request}, position {position} has no row for layer {layer}"
        )
        with pytest.raises(ValueError, match=rf"{named}; record every token"):
            _ask(routing, layer, request, position)


@pytest.mark.parametrize(
    ("column", "row", "value", "message"),
    [
        ("expert_ids", 2, [0, 3], r"row 3: expert_ids=\[0, 3\] must be from 0 to 2.*; choose"),
        ("expert_ids", 0, [-1, 0], r"row 1: expert_ids=\[-1, 0\] must be from 0"),
        ("expert_ids", 1, [2, 2], r"row 2: expert_ids=\[2, 2\] must be distinct; correct"),
        ("expert_ids", 1, [2], r"row 2: expert_ids holds 1 experts .* top_k=2; choose"),
        ("expert_ids", 3, [2, None], r"row 4: expert_ids holds a null"),
        ("expert_ids", 3, None, r"row 4: expert_ids is null"),
        ("request", 2, None, r"row 3: request is null; correct or remove"),
        ("position", 2, -4, r"row 3: position=-4 must be from 0 to 2147483647; correct"),
        ("layer", 2, 10_000, r"row 3: layer=10000 must be from 0 to 9999"),
        ("layer", 0, 0, r"row 2: layer 0, request 0, position 3 is in row 1 too; remove"),
    ],
)
def test_a_broken_row_is_named(
    column: str, row: int, value: Any, message: str, tmp_path: Path
) -> None:
    columns = {name: list(values) for name, values in ROWS.items()}
    columns[column][row] = value
    routing = _file(tmp_path, columns)
    for ask in (lambda: _ask(routing, 0, 0, 3), lambda: routing.loads(0, 2, 3, 2)):
        with pytest.raises(ValueError, match=rf"gate\.parquet: {message}"):
            ask()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layer": [0.0, 1.0, 0.5, 0.0]}, r"column layer holds double and must hold whole"),
        ({"expert_ids": [0, 1, 2, 0]}, r"column expert_ids holds int64 and must hold lists"),
        (
            {"expert_ids": [["a", "b"]] * 4},
            r"column expert_ids holds list<.*string> and must hold lists of whole",
        ),
        ({name: pa.array([], pa.int64()) for name in ROWS}, r"has 0 rows and must have some"),
    ],
)
def test_a_column_of_another_type_is_named(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"gate\.parquet: {message}"):
        _ask(_file(tmp_path, {**ROWS, **changed}), 0, 0, 3)


def test_a_missing_column_and_a_missing_file_are_named(tmp_path: Path) -> None:
    columns = {name: values for name, values in ROWS.items() if name != "position"}
    with pytest.raises(
        ValueError, match=r"gate\.parquet: lacks the columns \['position'\] and has"
    ):
        _ask(_file(tmp_path, columns), 0, 0, 3)
    with pytest.raises(
        ValueError, match=r"path=nowhere must be a readable Parquet file but is not"
    ):
        _ask(Recorded(path="nowhere"), 0, 0, 3)
    (tmp_path / "text").write_text("layer,request\n")
    with pytest.raises(ValueError, match=r"text must be a readable Parquet file but is not"):
        _ask(Recorded(path=str(tmp_path / "text")), 0, 0, 3)


@pytest.mark.parametrize(("num_layers", "has"), [(3, "no row for layer 2"), (1, "layer 1")])
def test_loads_need_the_layers_of_the_model(num_layers: int, has: str, tmp_path: Path) -> None:
    rule = rf"has {has} and must have rows for layers 0 to {num_layers - 1}.*; choose the model"
    with pytest.raises(ValueError, match=rule):
        _file(tmp_path, ROWS).loads(0, num_layers, 3, 2)


def test_a_writer_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = Path(_file(tmp_path, ROWS).path)
    before, one = path.read_bytes(), np.array([0])
    with pytest.raises(ValueError, match=r"\[1, 1, 1, 2\] rows and must have equally many"):
        write_choices(path, Tokens(one, one), one, np.array([[0], [1]]))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
