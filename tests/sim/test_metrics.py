"""Every metric against the plain definition, computed token by token."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_cases import (
    POLICIES,
    ROOMY,
    Case,
    Grid,
    PromptSeconds,
    cases,
    recorded,
    run_case,
    serve,
)

from sim import metrics
from sim.metrics import RequestTimes, Slo, WeightedGaps, request_times, token_times
from sim.policies.batching.chunked_prefill import ChunkedPrefill
from sim.policies.batching.continuous import Continuous
from sim.policies.batching.static import Static
from sim.trace import State, Trace
from sim.workload.lengths import LengthDistribution
from sim.workload.poisson import Poisson

EVERY_POLICY = pytest.mark.parametrize("name", POLICIES)


def all_tokens(trace: Trace) -> list[np.ndarray]:
    return [token_times(trace, one) for one in sorted(trace.requests["request"].tolist())]


@EVERY_POLICY
@settings(max_examples=30)
@given(case=cases())
def test_request_times_are_those_of_the_tokens(name: str, case: Case) -> None:
    trace = run_case(case, POLICIES[name])
    times, tokens = request_times(trace), all_tokens(trace)
    assert times.request.tolist() == list(range(len(tokens)))
    assert times.first_token_s.tolist() == [mine[0] for mine in tokens]
    assert times.last_token_s.tolist() == [mine[-1] for mine in tokens]
    assert times.output_tokens.tolist() == [len(mine) for mine in tokens]
    for row, mine in enumerate(tokens):
        of_mine = trace.events["request"] == row
        states = trace.events["state"][of_mine].tolist()
        instants_s = trace.events["instant_s"][of_mine].tolist()
        assert times.scheduled_s[row] == instants_s[states.index(State.admitted)]
        assert times.num_preemptions[row] == states.count(State.preempted)
        assert times.last_token_s[row] == instants_s[states.index(State.finished)]
        if len(mine) > 1:
            assert times.tpot_s[row] == pytest.approx(np.diff(mine).mean(), rel=1e-12)
        else:
            assert np.isnan(times.tpot_s[row])


@EVERY_POLICY
@settings(max_examples=30)
@given(case=cases(), q=st.floats(0, 100))
def test_gaps_are_those_between_all_tokens(name: str, case: Case, q: float) -> None:
    trace = run_case(case, POLICIES[name])
    odd = np.arange(1, len(case.workload.arrival_s), 2)
    assert_same_gaps(metrics.inter_token_gaps(trace), all_tokens(trace), q)
    assert_same_gaps(metrics.inter_token_gaps(trace, odd), all_tokens(trace)[1::2], q)


def assert_same_gaps(gaps: WeightedGaps, tokens: list[np.ndarray], q: float) -> None:
    every = np.concatenate([np.zeros(0), *map(np.diff, tokens)])
    assert gaps.weight.sum() == len(every)
    np.testing.assert_allclose(
        np.sort(np.repeat(gaps.gap_s, gaps.weight)), np.sort(every), rtol=1e-12
    )
    if len(every):
        assert gaps.percentile(q) == pytest.approx(np.percentile(every, q), rel=1e-12)
        assert gaps.mean() == pytest.approx(every.mean(), rel=1e-12)
    else:
        assert np.isnan([gaps.percentile(q), gaps.mean()]).all()


@given(
    st.lists(st.tuples(st.floats(0.001, 10), st.integers(0, 4)), min_size=1, max_size=30),
    st.one_of(st.floats(0, 100), st.sampled_from([0.0, 50.0, 90.0, 99.0, 100.0])),
)
def test_a_weighted_percentile_is_that_of_the_full_list(
    rows: list[tuple[float, int]], q: float
) -> None:
    values, counts = (np.array(column) for column in zip(*rows, strict=True))
    full = np.repeat(values, counts)
    found = WeightedGaps(values, counts).percentile(q)
    if len(full):
        assert found == pytest.approx(np.percentile(full, q), rel=1e-12)
    else:
        assert np.isnan(found)


@EVERY_POLICY
@settings(max_examples=30)
@given(case=cases())
def test_the_parts_of_ttft_add_up_and_none_is_negative(name: str, case: Case) -> None:
    trace = run_case(case, POLICIES[name])
    times = request_times(trace)
    parts = metrics.ttft_parts(trace, times)
    np.testing.assert_allclose(sum(parts), times.ttft_s, rtol=1e-12, atol=1e-12)
    for part in parts:
        assert (part >= -1e-9).all()
    some = times.request % 2 == 1
    chosen = RequestTimes(*[column[some] for column in times])
    for part, of_some in zip(parts, metrics.ttft_parts(trace, chosen), strict=True):
        np.testing.assert_allclose(of_some, part[some], rtol=1e-12, atol=1e-12)


def test_the_parts_of_ttft_name_their_cause() -> None:
    cost = PromptSeconds(token_s=0.25, decode_s=0.5)
    alone = serve(recorded([(1.0, 4, 2)]), Continuous(), cost=cost)
    assert ttft_rows(alone) == [(0.0, 1.0, 0.0)]
    # Two prompts of 4 tokens in one iteration of 2 s: half of it is the other one's.
    together = serve(recorded([(0, 4, 2), (0, 4, 2)]), Continuous(), cost=cost)
    assert ttft_rows(together) == [(0.0, 1.0, 1.0), (0.0, 1.0, 1.0)]
    # The second one waits for the first one's prefill to end.
    behind = serve(recorded([(0, 4, 2), (0.25, 4, 2)]), Continuous(), cost=cost)
    assert ttft_rows(behind) == [(0.0, 1.0, 0.0), (0.75, 1.0, 0.0)]
    queued = serve(recorded([(0, 4, 3), (1.25, 4, 1)]), Static(), cost=cost)
    assert ttft_rows(queued)[1] == (0.75, 1.0, 0.0)
    # A prompt of 8 in two chunks, each with one decode in its iteration of 1.5 s.
    limits = ROOMY._replace(max_num_batched_tokens=5, max_num_seqs=4)
    chunked = serve(recorded([(0, 5, 9), (0.5, 8, 1)]), ChunkedPrefill(), limits, cost)
    assert ttft_rows(chunked)[1] == pytest.approx((0.75, 2 * 1.5 * 0.8, 2 * 1.5 * 0.2))


def ttft_rows(trace: Trace) -> list[tuple[float, ...]]:
    parts = metrics.ttft_parts(trace, request_times(trace))
    assert not parts.search_s.any()
    return [tuple(row) for row in np.stack(parts[1:], axis=1).tolist()]


def some_times(arrival_s: list[float], wait_s: list[float], answer_s: float = 1.0) -> RequestTimes:
    """Requests that wait, have their first token 0.5 s later and their last at `answer_s`."""
    arrival, wait = np.array(arrival_s), np.array(wait_s)
    count = len(arrival)
    return RequestTimes(
        request=np.arange(count),
        arrival_s=arrival,
        scheduled_s=arrival + wait,
        first_token_s=arrival + wait + 0.5,
        last_token_s=arrival + wait + answer_s,
        output_tokens=np.full(count, 3),
        num_preemptions=np.zeros(count, np.int64),
    )


def test_the_steady_window_leaves_out_a_share_of_the_span_of_arrivals_at_either_end() -> None:
    times = some_times(list(map(float, range(11))), [0.0] * 11)
    assert np.flatnonzero(metrics.steady_window(times)).tolist() == list(range(1, 10))
    assert metrics.steady_window(times, 0.0, 0.0).all()
    assert np.flatnonzero(metrics.steady_window(times, 0.25, 0.5)).tolist() == [3, 4, 5]
    at_once = some_times([2.0] * 5, [0.0] * 5)
    assert metrics.steady_window(at_once).all()


@pytest.mark.parametrize(("load", "overloaded"), [(0.5, False), (0.8, False), (1.5, True)])
def test_a_system_that_falls_behind_is_overloaded(load: float, overloaded: bool) -> None:
    workload = Poisson(
        rate_per_s=load,
        num_requests=2000,
        input_tokens=8,
        output_tokens=1,
        lengths=LengthDistribution.fixed,
    )
    limits = ROOMY._replace(max_num_seqs=1)
    trace = serve(workload, Continuous(), limits, PromptSeconds(0.0, prefill_s=1.0))
    assert metrics.is_overloaded(request_times(trace)) is overloaded


def test_a_burst_or_a_handful_of_requests_is_not_called_overloaded() -> None:
    assert not metrics.is_overloaded(some_times([0.0] * 50, [float(row) for row in range(50)]))
    assert not metrics.is_overloaded(some_times([0.0, 0.1, 0.2], [0.0, 5.0, 9.0]))


def test_goodput_counts_requests_that_meet_every_demand() -> None:
    times = some_times([0.0, 1.0, 2.0], [0.0, 1.0, 2.0])
    assert metrics.met_slo(times, Slo()).tolist() == [True, True, True]
    assert metrics.met_slo(times, Slo(ttft_s=1.5)).tolist() == [True, True, False]
    assert metrics.met_slo(times, Slo(e2e_s=1.0)).tolist() == [True, False, False]
    assert metrics.met_slo(times, Slo(tpot_s=0.25)).tolist() == [True, True, True]
    assert metrics.met_slo(times, Slo(tpot_s=0.24)).tolist() == [False, False, False]
    assert metrics.met_slo(times, Slo(ttft_s=2.5, e2e_s=2.0)).tolist() == [True, True, False]
    single = times._replace(output_tokens=np.ones(3, np.int64))
    assert metrics.met_slo(single, Slo(tpot_s=0.01)).all()


@pytest.mark.parametrize("field", ["ttft_s", "tpot_s", "e2e_s"])
def test_a_demand_of_no_time_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=rf"slo\.{field}=0.* must be above 0"):
        Slo(**{field: 0.0})


def test_the_busy_share_is_the_time_in_iterations() -> None:
    trace = serve(recorded([(2.0, 1, 2), (5.0, 1, 2)]), Continuous(), cost=Grid(0.5))
    assert metrics.busy_share(trace) == 2.0 / 4.0
