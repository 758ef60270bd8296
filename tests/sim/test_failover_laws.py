"""Replicas that die and come back: nothing is lost, nothing is answered twice."""

from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_cases import CONTEXT, POLICIES, Case, Grid, assert_equal_traces, cases

from sim import metrics
from sim.decision_rows import canonical, expand
from sim.faults import Outage
from sim.policies.batching.base import Batching
from sim.policies.registry import policies
from sim.policies.routing.base import Routing
from sim.processes.failover import Failures, simulate_failures
from sim.processes.pace import Costed
from sim.processes.router import simulate_replicas
from sim.trace import State, Trace
from sim.trace_merge import of_replica
from sim.workload.source import Source

RULES: dict[str, Any] = {name: rule() for name, rule in policies("routing").items()}
EVERY_RULE = pytest.mark.parametrize("name", RULES)
BATCHING = POLICIES["chunked_prefill-{'chunk_tokens': 7}"]


class Plan(NamedTuple):
    """Replicas, and what becomes of them."""

    case: Case
    num_replicas: int
    failures: Failures


@st.composite
def plans(draw: st.DrawFn, *, closed: bool | None = None) -> Plan:
    """Deaths at random, on boundaries and arrivals often; one replica at least comes back."""
    case = draw(cases(closed=closed, prefixes=None))
    step_s = case.cost.step_s if isinstance(case.cost, Grid) else 0.05
    count = draw(st.integers(1, 3))
    found: list[Outage] = []
    for replica in range(count):
        at = 0
        for _ in range(draw(st.integers(0, 3))):
            at += draw(st.integers(1, 12))
            until = at + draw(st.integers(1, 12))
            found.append(Outage(replica, step_s * at, step_s * until))
            at = until
        if replica and draw(st.booleans()):
            found.append(Outage(replica, step_s * (at + draw(st.integers(1, 9))), float("inf")))
    found.sort(key=lambda one: (one.at_s, one.replica))
    detection_s = step_s * draw(st.sampled_from([0.25, 1.0, 3.0, 20.0]))
    return Plan(case, count, Failures.detected(found, detection_s))


def run(
    plan: Plan, routing: Routing, batching: Batching = BATCHING, *,
    one_by_one: bool = False, schedules_ahead: bool = False,
) -> Trace:  # fmt: skip
    pace = Costed(plan.case.cost)
    return simulate_failures(
        Source(plan.case.workload, 0, CONTEXT), routing, batching, plan.case.limits,
        lambda number, life: pace, plan.failures, num_replicas=plan.num_replicas,
        one_by_one=one_by_one, schedules_ahead=schedules_ahead,
    )  # fmt: skip


def assert_answered_once(trace: Trace, case: Case) -> None:
    """Every request has exactly its tokens, each later than the one before."""
    everyone = list(range(len(case.workload.arrival_s)))
    assert sorted(trace.requests["request"].tolist()) == everyone
    assert sorted(trace.answers["request"].tolist()) == everyone
    done = trace.events["request"][trace.events["state"] == State.finished]
    assert sorted(done.tolist()) == everyone
    times = metrics.request_times(trace)
    for at in everyone:
        instants_s = metrics.token_times(trace, at)
        assert len(instants_s) == case.workload.output_tokens[at]
        assert (np.diff(instants_s) > 0).all()
        assert instants_s[0] == times.first_token_s[at]
        assert instants_s[-1] == times.last_token_s[at]


@pytest.mark.parametrize("ahead", [False, True])
@EVERY_RULE
@settings(max_examples=60)
@given(plan=plans())
def test_every_request_is_answered_once_with_exactly_its_tokens(
    name: str, ahead: bool, plan: Plan
) -> None:
    assert_answered_once(run(plan, RULES[name], schedules_ahead=ahead), plan.case)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=40)
@given(plan=plans())
def test_macro_steps_equal_single_steps_whoever_dies(policy: str, plan: Plan) -> None:
    fast, slow = (
        run(plan, RULES["least_loaded"], POLICIES[policy], one_by_one=single)
        for single in (False, True)
    )
    for table in ("routes", "answers", "requests", "events", "iterations"):
        ours, theirs = getattr(fast, table), getattr(slow, table)
        for column in ours:
            np.testing.assert_array_equal(ours[column], theirs[column], f"{table}.{column}")
    for at in range(plan.num_replicas):
        one, other = (canonical(of_replica(trace, at)) for trace in (fast, slow))
        assert expand(one) == expand(other)


@EVERY_RULE
@settings(max_examples=40)
@given(plan=plans())
def test_a_dead_replica_runs_no_iteration(name: str, plan: Plan) -> None:
    trace = run(plan, RULES[name])
    rows = trace.iterations
    for one in plan.failures.outages:
        mine = rows["replica"] == one.replica
        inside = (rows["end_s"] >= one.at_s) & (rows["start_s"] < one.until_s)
        assert not (mine & inside).any()


@EVERY_RULE
@settings(max_examples=20)
@given(case=cases(prefixes=None), count=st.integers(1, 3))
def test_without_a_death_nothing_changes(name: str, case: Case, count: int) -> None:
    paces = [Costed(case.cost)] * count
    plain = simulate_replicas(
        Source(case.workload, 0, CONTEXT), RULES[name], BATCHING, case.limits, paces
    )
    assert_equal_traces(plain, run(Plan(case, count, Failures([], [])), RULES[name]))


def test_the_random_deaths_do_hit_answers_in_the_middle() -> None:
    seen = {"lost": 0, "in mid-answer": 0, "sent again": 0, "on a boundary": 0}

    @settings(max_examples=60)
    @given(plan=plans())
    def count(plan: Plan) -> None:
        trace = run(plan, RULES["round_robin"])
        seen["lost"] += int((trace.events["state"] == State.lost).sum())
        seen["in mid-answer"] += int((trace.routes["generated_tokens"] > 0).sum())
        seen["sent again"] += len(trace.routes["request"]) - len(trace.requests["request"])
        ends = set(trace.iterations["end_s"].tolist())
        seen["on a boundary"] += len(ends.intersection(one.at_s for one in plan.failures.outages))

    count()
    # Boundaries of other replicas; an iteration that would end with its own replica is lost.
    assert min(seen.values()) >= 5, seen
