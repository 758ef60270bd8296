"""Retrieval traces: what was written is replayed, and every broken line is named."""

import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.workload.base import RequestColumns
from sim.workload.knowledge import Documents, KnowledgeWorkload, check_retrieved
from sim.workload.retrieval import Retrieval
from sim.workload.retrieval_trace import RetrievalTrace, RetrievedRequest, write_retrieval_trace
from sim.workload.source import check

CORPUS = Documents(np.array([10, 20, 30, 40]), system_tokens=5)
ROWS = [
    RetrievedRequest(0.0, 7, 1, ((0, 1), (3, 1))),
    RetrievedRequest(0.25, 8, 2, ((2,),)),
    RetrievedRequest(0.25, 9, 3, ((1, 2, 0), (0,), (0, 2))),
]
HEADER = json.dumps({"document_tokens": [10, 20, 30, 40], "system_tokens": 5})
GOOD = json.dumps(ROWS[0]._asdict())


def _written(folder: Path, rows: list[RetrievedRequest] = ROWS, name: str = "trace.jsonl") -> str:
    write_retrieval_trace(folder / name, CORPUS, rows)
    return str(folder / name)


def _one(workload: KnowledgeWorkload) -> RequestColumns:
    (chunk,) = workload.columns(0)
    return chunk


def test_the_file_is_what_its_format_says(tmp_path: Path) -> None:
    lines = Path(_written(tmp_path)).read_text().splitlines()
    assert [json.loads(line) for line in lines[:2]] == [
        {"document_tokens": [10, 20, 30, 40], "system_tokens": 5},
        {"arrival_s": 0.0, "question_tokens": 7, "output_tokens": 1, "stages": [[0, 1], [3, 1]]},
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["trace.jsonl"]


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_what_was_written_is_replayed(name: str, tmp_path: Path) -> None:
    trace = RetrievalTrace(path=_written(tmp_path, name=name))
    columns = _one(trace)
    assert columns.arrival_s.tolist() == [0.0, 0.25, 0.25]
    assert columns.prompt_tokens.tolist() == [5 + 60 + 7, 5 + 30 + 8, 5 + 40 + 9]
    assert columns.output_tokens.tolist() == [1, 2, 3]
    assert columns.retrieved == [row.stages for row in ROWS]
    assert trace.documents(0).tokens.tolist() == CORPUS.tokens.tolist()
    assert trace.documents(0).system_tokens == 5
    check_retrieved(columns, trace.documents(0))
    assert check(trace, 0, 100).num_requests == 3


@given(
    rows=st.lists(
        st.builds(
            RetrievedRequest,
            st.floats(0, 1e6),
            st.integers(1, 1000),
            st.integers(1, 1000),
            st.lists(
                st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True).map(tuple),
                min_size=1, max_size=4,
            ).map(tuple),
        ),
        min_size=1, max_size=8,
    )
)  # fmt: skip
def test_any_rows_come_back(
    rows: list[RetrievedRequest], tmp_path_factory: pytest.TempPathFactory
) -> None:
    first, *later = sorted(rows, key=lambda row: row.arrival_s)
    rows = [first._replace(arrival_s=0.0), *later]
    trace = RetrievalTrace(path=_written(tmp_path_factory.getbasetemp(), rows))
    columns = _one(trace)
    assert columns.arrival_s.tolist() == [row.arrival_s for row in rows]
    assert columns.retrieved == [row.stages for row in rows]
    assert columns.output_tokens.tolist() == [row.output_tokens for row in rows]
    check_retrieved(columns, trace.documents(0))


def test_a_generated_load_written_down_is_the_same_load(tmp_path: Path) -> None:
    load = Retrieval(rate_per_s=2.0, num_requests=300, num_documents=200, system_tokens=9)
    (columns,) = load.columns(4)
    assert columns.retrieved is not None
    corpus = load.documents(4)
    rows = [
        RetrievedRequest(arrival_s - columns.arrival_s[0], 100, output_tokens, stages)
        for arrival_s, output_tokens, stages in zip(
            columns.arrival_s.tolist(), columns.output_tokens.tolist(), columns.retrieved,
            strict=True,
        )
    ]  # fmt: skip
    write_retrieval_trace(tmp_path / "load.jsonl", corpus, rows)
    replay = RetrievalTrace(path=str(tmp_path / "load.jsonl"))
    found = _one(replay)
    np.testing.assert_array_equal(found.arrival_s, columns.arrival_s - columns.arrival_s[0])
    np.testing.assert_array_equal(found.prompt_tokens, columns.prompt_tokens)
    np.testing.assert_array_equal(replay.documents(0).tokens, corpus.tokens)
    assert found.retrieved == columns.retrieved


def test_a_writer_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = Path(_written(tmp_path))
    before = path.read_text()
    with pytest.raises(ValueError, match="not JSON compliant"):
        _written(tmp_path, [*ROWS, ROWS[0]._replace(arrival_s=float("nan"))])
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_scale_limit_and_chunks_are_those_of_a_replay(tmp_path: Path) -> None:
    path = _written(tmp_path)
    assert _one(RetrievalTrace(path=path, scale=2.0)).arrival_s.tolist() == [0.0, 0.125, 0.125]
    assert _one(RetrievalTrace(path=path, max_output_tokens=2)).output_tokens.tolist() == [1, 2, 2]
    parts = list(RetrievalTrace(path=path).columns(0, 1))
    assert list(chain.from_iterable(part.retrieved or () for part in parts)) == [
        row.stages for row in ROWS
    ]
    with Path(path).open("a") as file:
        file.write("broken\n")
    assert len(_one(RetrievalTrace(path=path, limit=3))) == 3


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["[1]", GOOD], r":1: .* must be a JSON object"),
        ([GOOD], r":1: .* lacks document_tokens"),
        ([HEADER.replace("[10, 20, 30, 40]", "[]"), GOOD], r":1: document_tokens=\[\] must be a"),
        ([HEADER.replace("20", "0"), GOOD], r":1: document_tokens\[1\]=0 must be a whole number"),
        ([HEADER.replace(": 5", ": -1"), GOOD], r":1: system_tokens=-1 must be a whole number"),
        ([HEADER], r":1: no request follows"),
        ([HEADER, GOOD, GOOD[:20]], r":3: .* does not end a JSON object"),
        ([HEADER, GOOD, "", GOOD], r":3: the line is blank"),
        ([HEADER, GOOD.replace("stages", "steps")], r":2: .* lacks stages"),
        ([HEADER, GOOD.replace("0.0", "-1e16")], r":2: arrival_s=-1e\+16 must be a number of sec"),
        ([HEADER, GOOD.replace("0.0", "3"), GOOD], r":3: .* must not go backwards"),
        ([HEADER, GOOD.replace(": 7", ": 0")], r":2: question_tokens=0 must be a whole number"),
        ([HEADER, GOOD.replace(": 1,", ": true,")], r":2: output_tokens=True must be a whole"),
        ([HEADER, GOOD.replace("[[0, 1], [3, 1]]", "[]")], r":2: stages=\[\] must be lists of"),
        ([HEADER, GOOD.replace("[0, 1]", "[]")], r":2: stages=\[\[\], \[3, 1\]\] must be lists"),
        ([HEADER, GOOD.replace("[0, 1]", "[0, 4]")], r":2: stages=.* documents from 0 to 3"),
        ([HEADER, GOOD.replace("[0, 1]", "[0, -1]")], r":2: stages=.* documents from 0 to 3"),
        ([HEADER, GOOD.replace("[0, 1]", "[1, 1]")], r":2: stages=.* none twice in a list; corr"),
        ([HEADER, GOOD.replace("[0, 1]", "[[0], 1]")], r":2: stages=.* must be lists"),
        ([HEADER, GOOD.replace("[0, 1]", "7")], r":2: stages=.* must be lists"),
    ],
)
def test_a_broken_line_is_named(lines: list[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"trace\.jsonl" + message):
        list(RetrievalTrace(path=str(path)).columns(0))


def test_prompts_are_not_cut_and_no_file_is_opened_early() -> None:
    with pytest.raises(ValueError, match=r"max_input_tokens=9 would cut the documents.*; set it"):
        RetrievalTrace(path="nowhere.jsonl", max_input_tokens=9)
    assert RetrievalTrace(path="nowhere.jsonl").path == "nowhere.jsonl"
