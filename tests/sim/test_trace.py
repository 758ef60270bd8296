"""Traces survive the disk, and files that are not whole traces are refused by path."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from serving_cases import (
    CONTEXT,
    POLICIES,
    TABLES,
    Case,
    assert_equal_traces,
    cases,
    recorded,
    run_case,
    serve,
)

from sim.models.work import IterationShape
from sim.policies.batching.continuous import Continuous
from sim.processes.exact_time import ExactEnvironment
from sim.processes.pace import Costed
from sim.processes.replica import Replica
from sim.recorder import Recorder
from sim.trace import SPANS, State, Trace
from sim.trace_files import load_trace
from sim.workload.source import Source


@pytest.fixture
def trace() -> Trace:
    return serve(recorded([(0.0, 4, 3), (0.5, 2, 4)]), Continuous())


@settings(max_examples=5)
@given(case=cases())
def test_a_trace_is_the_same_after_saving_and_loading(
    tmp_path_factory: pytest.TempPathFactory, case: Case
) -> None:
    folder = tmp_path_factory.mktemp("trace")
    for policy in POLICIES.values():
        written = run_case(case, policy)
        written.save(folder)
        assert_equal_traces(load_trace(folder), written)


def test_spans_keep_their_names_and_columns(tmp_path: Path) -> None:
    recorder = Recorder()
    row = dict(zip(SPANS, (0.5, 1.25, 4e9, 3e6, 7), strict=True))
    recorder.span("link pcie", "transfer", row)
    spans = recorder.trace()
    spans.save(tmp_path / "made" / "here")
    loaded = load_trace(tmp_path / "made" / "here")
    assert_equal_traces(loaded, spans)
    assert loaded.frame("spans").to_dict("records") == [
        {"resource": "link pcie", "operation": "transfer", **row}
    ]


def test_a_trace_without_rows_is_a_trace(tmp_path: Path) -> None:
    nothing = Recorder().trace()
    nothing.save(tmp_path)
    assert_equal_traces(load_trace(tmp_path), nothing)
    assert [len(nothing.frame(table)) for table in TABLES] == [0] * len(TABLES)


def test_a_recorder_goes_on_after_it_gave_a_trace() -> None:
    recorder = Recorder()
    recorder.event(1, 0.5, State.admitted)
    before = recorder.trace()
    recorder.event(1, 0.75, State.decoding)
    assert before.events["instant_s"].tolist() == [0.5]
    assert recorder.trace().events["instant_s"].tolist() == [0.5, 0.75]


@pytest.mark.parametrize("table", TABLES)
def test_a_missing_table_is_named(trace: Trace, tmp_path: Path, table: str) -> None:
    trace.save(tmp_path)
    (tmp_path / f"{table}.parquet").unlink()
    with pytest.raises(ValueError, match=rf"{table}\.parquet is not a readable trace table"):
        load_trace(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_table_is_refused(trace: Trace, tmp_path: Path, share: float) -> None:
    trace.save(tmp_path)
    path = tmp_path / "runs.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"runs\.parquet is not a readable trace table"):
        load_trace(tmp_path)


def test_another_schema_version_is_refused(trace: Trace, tmp_path: Path) -> None:
    trace.save(tmp_path)
    path = tmp_path / "events.parquet"
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({b"diptych_trace_schema": b"99"}), path)
    with pytest.raises(ValueError, match=r"events\.parquet has trace schema 99, this release"):
        load_trace(tmp_path)
    pq.write_table(table.replace_schema_metadata(None), path)
    with pytest.raises(ValueError, match=r"events\.parquet has trace schema none"):
        load_trace(tmp_path)


def test_frames_have_a_row_an_entry_and_lists_as_columns(trace: Trace) -> None:
    requests = trace.frame("requests")
    assert requests["prompt_tokens"].tolist() == [4, 2]
    assert list(requests["arrival_s"]) == [0.0, 0.5]
    decisions = trace.frame("decisions")
    assert len(decisions) == len(trace.decisions["repeat"])
    assert list(decisions["admitted"])[:2] == [[0], [1]]
    assert list(decisions["prefilled_tokens"])[:2] == [[4], [2]]
    with pytest.raises(ValueError, match=r"table='tokens' is not in a trace; take one of iter"):
        trace.frame("tokens")


def test_shapes_in_decisions_are_those_of_the_work(trace: Trace) -> None:
    rows = np.stack([trace.decisions[name] for name in IterationShape._fields], axis=1)
    first = IterationShape.of([(4, 0)], (), 1)
    assert rows[0].tolist() == list(first)


@settings(max_examples=10)
@given(case=cases(prefixes=None))
def test_a_trace_put_together_from_news_is_the_same(case: Case) -> None:
    """As a router does that is sent what a replica has done, iteration by iteration."""
    for policy in POLICIES.values():
        environment = ExactEnvironment()
        replica = Replica(
            environment, policy, case.limits, Costed(case.cost), one_by_one=True
        )  # fmt: skip
        for request in Source(case.workload, 0, CONTEXT).initial():
            replica.submit(request)
        known: dict[str, int] = {}
        copy = Recorder()
        while environment.peek() < float("inf"):
            environment.step()
            copy.take(replica.recorder.news(known))
        assert_equal_traces(copy.trace(), replica.recorder.trace())
        assert replica.recorder.news(known) == {}
