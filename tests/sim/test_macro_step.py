"""Taking many iterations in one event changes no bit of what happens."""

import pytest
from hypothesis import given, settings
from serving_cases import POLICIES, Case, Grid, assert_equal_traces, cases, recorded, run_case

from sim.decision_rows import canonical, expand
from sim.engine import ReplicaLimits
from sim.trace import State


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=80)
@given(case=cases())
def test_macro_steps_equal_single_steps_bit_for_bit(name: str, case: Case) -> None:
    fast = run_case(case, POLICIES[name])
    slow = run_case(case, POLICIES[name], one_by_one=True)
    assert_equal_traces(canonical(fast), canonical(slow))
    assert expand(canonical(fast)) == expand(canonical(slow))


@pytest.mark.parametrize("name", ["continuous", "chunked_prefill"])
def test_an_arrival_at_exactly_a_boundary_is_seen_by_it(name: str) -> None:
    # The grid's boundaries lie at multiples of 0.5 s; request 1 arrives at one of them.
    case = Case(recorded([(0, 1, 9), (2.0, 1, 9)]), ReplicaLimits(4, 64, 16, 99), Grid(0.5))
    trace = run_case(case, POLICIES[name])
    admitted = trace.events["instant_s"][trace.events["state"] == State.admitted]
    assert 2.0 in trace.iterations["end_s"]
    assert admitted.tolist() == [0.0, 2.0]


@pytest.mark.parametrize("name", POLICIES)
def test_a_long_decode_is_one_decision_and_many_iterations(name: str) -> None:
    case = Case(recorded([(0, 7, 500)]), ReplicaLimits(4, 64, 16, 99), Grid(0.5))
    trace = run_case(case, POLICIES[name])
    prefills = int((trace.decisions["prefill_tokens"] > 0).sum())
    assert trace.num_iterations == prefills + 499
    assert len(trace.decisions["repeat"]) == prefills + 1


def test_the_random_loads_do_pre_empt_and_do_tie() -> None:
    seen = {"preempted": 0, "ties": 0}

    @settings(max_examples=60)
    @given(case=cases())
    def count(case: Case) -> None:
        for policy in POLICIES.values():
            trace = run_case(case, policy)
            seen["preempted"] += int((trace.events["state"] == State.preempted).sum())
            ends = set(trace.iterations["end_s"].tolist())
            seen["ties"] += len(ends.intersection(trace.requests["arrival_s"].tolist()))

    count()
    assert seen["preempted"] > 50
    assert seen["ties"] > 200
