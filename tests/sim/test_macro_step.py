"""Taking many iterations in one event changes no bit of what happens."""

from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_cases import (
    CONTEXT,
    POLICIES,
    Case,
    Grid,
    PromptSeconds,
    assert_equal_traces,
    cases,
    recorded,
    run_case,
)
from simpy.events import Event

from sim.decision_rows import canonical, expand
from sim.engine import ReplicaLimits
from sim.policies.batching.base import Batching
from sim.processes.alone import simulate
from sim.processes.exact_time import ExactEnvironment
from sim.processes.pace import Costed, Jitter, Jittered
from sim.processes.replica import Replica
from sim.trace import State, Trace
from sim.workload.source import Source


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=80)
@given(case=cases(prefixes=None))
def test_macro_steps_equal_single_steps_bit_for_bit(name: str, case: Case) -> None:
    fast = run_case(case, POLICIES[name])
    slow = run_case(case, POLICIES[name], one_by_one=True)
    assert_equal_traces(canonical(fast), canonical(slow))
    assert expand(canonical(fast)) == expand(canonical(slow))


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=30)
@given(case=cases(prefixes=None), seed=st.integers(0, 3))
def test_jitter_is_the_same_for_macro_steps_and_single_steps(
    name: str, case: Case, seed: int
) -> None:
    pace = Jittered(case.cost, Jitter([0.5, 0.9, 1.0, 1.6], seed))
    fast, slow = (
        simulate(
            Source(case.workload, 0, CONTEXT), POLICIES[name], case.limits, pace, one_by_one=single
        )
        for single in (False, True)
    )
    assert_equal_traces(canonical(fast), canonical(slow))


def test_jitter_draws_every_measured_ratio_equally_often() -> None:
    ratios = [0.7, 1.0, 1.1, 1.2]
    case = Case(recorded([(0, 1, 8001)]), ReplicaLimits(1, 64, 16, 999), PromptSeconds(1.0, 0, 1.0))
    source = Source(case.workload, 0, CONTEXT)
    pace = Jittered(case.cost, Jitter(ratios, 0))
    trace = simulate(source, POLICIES["continuous"], case.limits, pace)
    spent_s = (trace.iterations["end_s"] - trace.iterations["start_s"])[1:].round(6)
    values, times = np.unique(spent_s, return_counts=True)
    assert values.tolist() == ratios
    assert times == pytest.approx(2000, rel=0.1)


def watch(
    case: Case, policy: Batching, looks_s: list[float], *, one_by_one: bool
) -> tuple[list[tuple[Any, ...]], Trace]:
    """What somebody sees who looks at the replica at some instants, and the trace all the same."""
    environment = ExactEnvironment()
    replica = Replica(
        environment, policy, case.limits, Costed(case.cost), one_by_one=one_by_one
    )  # fmt: skip
    seen: list[tuple[Any, ...]] = []

    def look() -> Generator[Event, Any, None]:
        for instant_s in looks_s:
            yield environment.arrival(instant_s)
            state = replica.look()
            seen.append((instant_s, *state.observed(), tuple(state.running())))

    def arrive() -> Generator[Event, Any, None]:
        for request in Source(case.workload, 0, CONTEXT).initial():
            yield environment.arrival(request.arrival_s)
            replica.submit(request)

    environment.process(look())
    environment.process(arrive())
    environment.run()
    return seen, replica.recorder.trace()


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=40)
@given(case=cases(closed=False, prefixes=None), ticks=st.lists(st.integers(0, 400), max_size=30))
def test_whoever_looks_in_mid_run_sees_the_same_as_one_by_one_and_changes_nothing(
    name: str, case: Case, ticks: list[int]
) -> None:
    # Quarters of a grid's step: some looks lie on boundaries and arrivals, the others between.
    looks_s = [0.125 * tick for tick in sorted(ticks)]
    fast, trace = watch(case, POLICIES[name], looks_s, one_by_one=False)
    slow, _ = watch(case, POLICIES[name], looks_s, one_by_one=True)
    assert fast == slow
    assert_equal_traces(trace, run_case(case, POLICIES[name]))


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
    @given(case=cases(prefixes=None))
    def count(case: Case) -> None:
        for policy in POLICIES.values():
            trace = run_case(case, policy)
            seen["preempted"] += int((trace.events["state"] == State.preempted).sum())
            ends = set(trace.iterations["end_s"].tolist())
            seen["ties"] += len(ends.intersection(trace.requests["arrival_s"].tolist()))

    count()
    assert seen["preempted"] > 50
    assert seen["ties"] > 200
