"""Whatever a plan of elastic instances does within its rules, nothing is lost and time is right."""

from typing import Any

import numpy as np
import pytest
from elastic_random import AnyStep, ElasticCase, elastic_cases, run_elastic
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.decision_rows import expand
from sim.elastic_trace import DECODE, PREFILL
from sim.engine import ReplicaLimits
from sim.metrics import request_times, token_times
from sim.policies.elastic import ElasticPlan, ElasticView
from sim.processes.elastic_pace import LoggedGroups, LoggedTransport
from sim.steps import DecodeGroup, Migration, Prefill, Step
from sim.trace import State
from sim.workload.recorded import Recorded


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


class Scripted(ElasticPlan):
    """Prefills on the first instance, moves what is there to the second, and decodes."""

    def step(self, memory: Any, view: ElasticView) -> Step:
        del memory
        if view.waiting:
            one = view.waiting[0]
            return Step(prefill=(Prefill((one.request_id,), (0,), ((0, one.prefill_tokens),)),))
        if not view.batches:
            return Step()
        (batch,) = view.batches
        if batch.tokens[0] > 0 and not batch.tokens[1]:
            move = Migration(batch.number, 0, 1, int(batch.tokens[0]))
            return Step(migrate=(move,), decode=(DecodeGroup((batch.number,), (1,), ((1, 1),)),))
        return Step(decode=(DecodeGroup((batch.number,), (1,), ((1, 1),)),))


def test_a_migration_takes_its_bytes_over_the_link_and_the_round_begins_when_it_has_ended() -> None:
    case = ElasticCase(
        workload=Recorded(arrival_s=[0.0], prompt_tokens=[6], output_tokens=[3]),
        num_instances=2, limits=ReplicaLimits(8, 64, 1, 16),
    )  # fmt: skip
    _, tables = run_elastic(case, Scripted())
    moves, members = tables.kv_moves, tables.members
    assert moves["tokens"].tolist() == [6]
    took_s = moves["end_s"] - moves["begin_s"]
    assert took_s.tolist() == [0.25 + 6 / 4]  # latency, then four tokens a second
    rounds = members["kind"] == DECODE
    assert members["start_s"][rounds].min() == moves["end_s"][0]
    assert members["instance"][rounds].tolist() == [1] * int(rounds.sum())


def test_a_step_that_breaks_a_rule_is_refused_with_the_plan_and_the_instant() -> None:
    class Careless(Scripted):
        def step(self, memory: Any, view: ElasticView) -> Step:
            step = super().step(memory, view)
            bad = tuple(one._replace(targets=((0, 1),)) for one in step.prefill)
            return step._replace(prefill=bad)

    case = ElasticCase(
        workload=Recorded(arrival_s=[0.5], prompt_tokens=[6], output_tokens=[3]),
        num_instances=2, limits=ReplicaLimits(8, 64, 1, 16),
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"policy Careless at 0\.5 s: .* do not add up to 6 tokens"
    ):
        run_elastic(case, Careless())


@pytest.mark.parametrize("instance", [0, 1])
def test_kv_on_its_way_from_or_to_an_instance_that_is_lost_is_lost(instance: int) -> None:
    class OnTheOther(Scripted):
        def step(self, memory: Any, view: ElasticView) -> Step:
            if len(view.live) == 2:
                return super().step(memory, view)
            (only,) = view.live
            if view.waiting:
                one = view.waiting[0]
                targets = ((only, one.prefill_tokens),)
                return Step(prefill=(Prefill((one.request_id,), (only,), targets),))
            if not view.batches:
                return Step()
            return Step(decode=(DecodeGroup((view.batches[0].number,), (only,), ((only, 1),)),))

    case = ElasticCase(
        workload=Recorded(arrival_s=[0.0], prompt_tokens=[6], output_tokens=[3]),
        num_instances=2, limits=ReplicaLimits(8, 64, 1, 16),
    )  # fmt: skip
    whole = run_elastic(case, Scripted())
    middle_s = float(whole.tables.kv_moves["begin_s"][0]) + 0.5
    trace, tables = run_elastic(case, OnTheOther(), losses=((middle_s, instance),))
    assert np.isnan(tables.kv_moves["end_s"]).all()
    states = trace.events["state"].tolist()
    assert states.count(State.lost) == 1
    assert states.count(State.finished) == 1
    prefills = tables.members["kind"] == PREFILL
    assert tables.members["instance"][prefills].tolist() == [0, 1 - instance]
