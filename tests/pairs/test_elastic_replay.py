"""Both panels of elastic instances do the same under replay, to the last slot and byte."""

import pytest

from backends.corruption import Corruption
from backends.serving import use_one_thread
from scenarios.validation.elastic import Case, cases, elastic_lines, exact_run, judge, run_both
from scenarios.validation.verdict import Verdict
from sim.policies.instance_plan.elastic_sp import ElasticSp
from sim.trace import DECODE

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
