"""Both panels of elastic instances do the same under replay, to the last slot and byte."""

from dataclasses import replace

import pytest

from backends.corruption import Corruption
from backends.elastic_orders import RankLoss
from backends.serving import use_one_thread
from scenarios.validation.elastic import (
    Case,
    cases,
    decision_line,
    elastic_lines,
    exact_run,
    judge,
    run_both,
    table_lines,
)
from scenarios.validation.verdict import Verdict
from sim.policies.instance_plan.elastic_sp import ElasticSp
from sim.trace import DECODE, State

REQUESTS, INSTANCES = 60, 3


def case_of() -> Case:
    use_one_thread()
    return next(cases({"elastic_sp": ElasticSp()}))._replace(must_change=False)


@pytest.fixture(scope="module")
def panels():
    return run_both(exact_run(case_of().plan, REQUESTS, 0, num_instances=INSTANCES))


def test_steps_groups_migrations_decisions_and_bytes_are_equal(panels):
    lines = judge(case_of(), panels)
    assert {line.question for line in lines} == {"decisions", "bytes"}
    assert [line for line in lines if line.error or line.verdict is not Verdict.passed] == []


def test_the_run_that_is_compared_has_groups_that_change(panels):
    members = panels.real.tables.members
    decodes = members["kind"] == DECODE
    assert set(members["instance"].tolist()) == set(range(INSTANCES))
    assert (decodes & (members["requests"] == 0)).any(), "a member that is no master"
    assert panels.traffic.changes["scale-downs"] > 0
    assert panels.traffic.changes["migrations"] > 0
    assert len(panels.real.answers) == REQUESTS


def test_a_token_that_was_never_stored_is_missed_in_the_bytes():
    fault = Corruption(kind="drop_copy", index=60)
    run = exact_run(case_of().plan, 10, 0, num_instances=INSTANCES, corruption=fault)
    missed = [one.metric for one in elastic_lines(case_of(), run)
              if one.verdict is Verdict.missed]  # fmt: skip
    assert missed == ["elastic_sp: KV bytes written", "elastic_sp: KV bytes freed"]


@pytest.mark.parametrize("after_orders", [7, 20])
def test_steps_groups_and_migrations_are_equal_when_an_instance_is_lost(after_orders):
    run = exact_run(case_of().plan, 40, 1, num_instances=INSTANCES + 1)
    panels = run_both(replace(run, losses=(RankLoss(1, after_orders),)))
    lost = panels.real.trace.events["state"] == State.lost
    assert panels.real.tables.steps["lost"].max() == 1
    lines = [*table_lines("elastic_sp", panels), decision_line("elastic_sp", panels)]
    assert [line for line in lines if line.error or line.verdict is not Verdict.passed] == []
    ours = panels.simulated.events
    assert sorted(panels.real.trace.events["request"][lost].tolist()) == sorted(
        ours["request"][ours["state"] == State.lost].tolist()
    )
    assert len(panels.real.answers) == 40
