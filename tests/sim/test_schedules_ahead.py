"""An engine that decides one iteration ahead: what that does to a request, and what it does not."""

import numpy as np
import pytest
from hypothesis import given, settings
from serving_cases import (
    POLICIES,
    Case,
    PromptSeconds,
    assert_equal_traces,
    cases,
    recorded,
    run_case,
    serve,
)

from sim.decision_rows import canonical, expand
from sim.metrics import request_times


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=80)
@given(case=cases(prefixes=None))
def test_macro_steps_equal_single_steps_bit_for_bit(name: str, case: Case) -> None:
    fast = run_case(case, POLICIES[name], schedules_ahead=True)
    slow = run_case(case, POLICIES[name], one_by_one=True, schedules_ahead=True)
    assert_equal_traces(canonical(fast), canonical(slow))
    assert expand(canonical(fast)) == expand(canonical(slow))


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=40)
@given(case=cases(prefixes=None))
def test_every_request_is_served_with_all_its_tokens(name: str, case: Case) -> None:
    now = run_case(case, POLICIES[name])
    ahead = run_case(case, POLICIES[name], schedules_ahead=True)
    for column in ("request", "prompt_tokens", "output_tokens"):
        served, expected = (np.sort(trace.requests[column]) for trace in (ahead, now))
        np.testing.assert_array_equal(served, expected)


# One request decodes from 0.5 s on, a second an iteration. Another one, whose prompt adds 0.5 s to
# an iteration, comes at `arrival_s`.
@pytest.mark.parametrize(
    ("arrival_s", "first_token_s"),
    [(1.25, 4.0), (1.5, 4.0), (1.500001, 5.0)],
    ids=["in mid-iteration", "at a boundary", "just after it"],
)
def test_a_request_waits_one_iteration_longer(arrival_s: float, first_token_s: float) -> None:
    cost = PromptSeconds(0.0, 0.5, 1.0)
    load = recorded([(0, 1, 50), (arrival_s, 1, 1)])
    policy = POLICIES["chunked_prefill"]
    at_once = serve(load, policy, cost=PromptSeconds(0.0, 0.5, 1.0))
    ahead = serve(load, policy, cost=cost, schedules_ahead=True)
    offset = request_times(ahead).ttft_s[1] - request_times(at_once).ttft_s[1]
    assert offset == pytest.approx(1.0)
    assert arrival_s + request_times(ahead).ttft_s[1] == pytest.approx(first_token_s)


def test_an_idle_replica_decides_at_once() -> None:
    load = recorded([(0, 1, 3), (50.25, 1, 3)])
    times = request_times(serve(load, POLICIES["continuous"], schedules_ahead=True))
    assert times.ttft_s[0] == pytest.approx(times.ttft_s[1])
