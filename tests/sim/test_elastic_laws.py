"""Whatever a plan of elastic instances does within its rules, nothing is lost and time is right."""

import numpy as np
from elastic_random import AnyStep, ElasticCase, elastic_cases, run_elastic
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.decision_rows import expand
from sim.elastic_trace import DECODE, PREFILL
from sim.metrics import request_times, token_times
from sim.processes.elastic_pace import LoggedGroups, LoggedTransport
from sim.trace import State


@settings(max_examples=150, deadline=None)
@given(case=elastic_cases(), seed=st.integers(0, 1000))
def test_every_request_has_its_whole_answer_once_in_order(case: ElasticCase, seed: int) -> None:
    trace, _ = run_elastic(case, AnyStep(seed=seed))
    times = request_times(trace)
    finished = trace.events["request"][trace.events["state"] == State.finished]
    assert sorted(finished.tolist()) == list(range(len(case.workload.arrival_s)))
    assert times.request.tolist() == sorted(finished.tolist())
    for request in times.request.tolist():
        instants = token_times(trace, request)
        assert len(instants) == case.workload.output_tokens[request]
        assert (np.diff(instants) > 0).all()
        assert instants[0] > case.workload.arrival_s[request]


@settings(max_examples=100, deadline=None)
@given(case=elastic_cases(), seed=st.integers(0, 1000))
def test_no_instance_is_in_two_groups_at_once(case: ElasticCase, seed: int) -> None:
    _, tables = run_elastic(case, AnyStep(seed=seed))
    members = tables.members
    for instance in range(case.num_instances):
        mine = members["instance"] == instance
        order = np.lexsort((members["end_s"][mine], members["start_s"][mine]))
        start_s, end_s = members["start_s"][mine][order], members["end_s"][mine][order]
        assert (end_s >= start_s).all()
        assert (start_s[1:] >= end_s[:-1]).all()


@settings(max_examples=100, deadline=None)
@given(case=elastic_cases(), seed=st.integers(0, 1000))
def test_a_run_from_the_log_of_another_decides_the_same(case: ElasticCase, seed: int) -> None:
    once = run_elastic(case, AnyStep(seed=seed), one_by_one=True)
    pace = LoggedGroups(once.tables)
    again = run_elastic(
        case, AnyStep(seed=seed), one_by_one=True, pace=pace, losses=(),
        transport=lambda environment: LoggedTransport(environment, pace),
    )  # fmt: skip
    for table in ("steps", "members", "kv_moves"):
        mine, theirs = getattr(once.tables, table), getattr(again.tables, table)
        for name in set(mine) - ({"end_s"} if table == "kv_moves" else set()):
            np.testing.assert_array_equal(mine[name], theirs[name], f"{table}.{name}")
    assert expand(once.trace) == expand(again.trace)


@settings(max_examples=60, deadline=None)
@given(case=elastic_cases(losses=False), seed=st.integers(0, 1000))
def test_what_members_keep_of_a_prefill_adds_up_to_its_tokens(case: ElasticCase, seed: int) -> None:
    trace, tables = run_elastic(case, AnyStep(seed=seed))
    prefills = tables.members["kind"] == PREFILL
    kept = int(tables.members["tokens"][prefills].sum())
    assert kept == int(trace.decisions["prefill_tokens"].sum())
    assert (tables.members["kind"][~prefills] == DECODE).all()
