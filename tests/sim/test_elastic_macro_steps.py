"""Taking many rounds in one event changes nothing, with any plan and any load."""

import numpy as np
import pytest
from elastic_random import ElasticCase, elastic_cases, run_elastic
from hypothesis import given, settings

from sim.decision_rows import canonical, expand
from sim.policies.elastic import ElasticPlan
from sim.policies.instance_plan.elastic_sp import ElasticSp
from sim.policies.instance_plan.static_sp import StaticSp
from sim.trace import State, Trace

PLANS: dict[str, ElasticPlan] = {
    "elastic_sp": ElasticSp(),
    "elastic_sp, often": ElasticSp(attempt_every=2, compute_bound_requests=1),
    "elastic_sp, no scale-up": ElasticSp(attempt_every=3, scale_up=False),
    "static_sp": StaticSp(attempt_every=2),
}


@pytest.mark.parametrize("name", PLANS)
@settings(max_examples=40, deadline=None)
@given(case=elastic_cases())
def test_macro_steps_of_rounds_equal_single_rounds(name: str, case: ElasticCase) -> None:
    fast, slow = (
        run_elastic(case, PLANS[name], one_by_one=single).trace for single in (False, True)
    )
    assert _same(fast, slow)


@pytest.mark.parametrize("name", PLANS)
@settings(max_examples=40, deadline=None)
@given(case=elastic_cases())
def test_every_request_is_answered_whatever_the_load(name: str, case: ElasticCase) -> None:
    trace, _ = run_elastic(case, PLANS[name])
    finished = trace.events["request"][trace.events["state"] == State.finished]
    assert sorted(finished.tolist()) == list(range(len(case.workload.arrival_s)))


def _same(fast: Trace, slow: Trace) -> bool:
    for table in ("requests", "events", "iterations"):
        mine, theirs = getattr(fast, table), getattr(slow, table)
        for name, column in mine.items():
            np.testing.assert_array_equal(column, theirs[name], f"{table}.{name}")
    return expand(canonical(fast)) == expand(canonical(slow))
