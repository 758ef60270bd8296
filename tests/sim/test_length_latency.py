"""Latencies by length against their plain definition, and who meets an SLO that grows with it."""

from math import nan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving_cases import recorded, serve

from hardware_models.parts import load_scaling
from sim.length_latency import (
    LOONGSERVE_SLOS,
    LatencySlo,
    LengthSlo,
    length_latencies,
    prompt_tokens_of,
)
from sim.metrics import RequestTimes, request_times
from sim.policies.batching.continuous import Continuous
from sim.workload.long_context import Dataset


def times_of(rows: list[tuple[float, float, int]]) -> RequestTimes:
    """From TTFT, end-to-end latency and output tokens; all arrive at 0."""
    ttft_s, e2e_s, tokens = (np.array(column) for column in zip(*rows, strict=True))
    count = len(rows)
    zeros = np.zeros(count)
    ids = np.arange(count)
    return RequestTimes(ids, zeros, zeros, ttft_s, e2e_s, tokens.astype(np.int64), ids * 0)


ROWS = st.lists(
    st.tuples(st.floats(0.01, 10), st.floats(0, 90), st.integers(1, 50), st.integers(1, 9999)),
    min_size=1,
    max_size=20,
)


@given(ROWS)
def test_means_are_those_of_every_request(rows: list[tuple[float, float, int, int]]) -> None:
    times = times_of([(first, first + more, tokens) for first, more, tokens, _ in rows])
    prompts = np.array([row[3] for row in rows])
    found = length_latencies(times, prompts)
    later = [more / (tokens - 1) for _, more, tokens, _ in rows if tokens > 1]
    expected = (
        sum((first + more) / (tokens + prompt) for first, more, tokens, prompt in rows) / len(rows),
        sum(first / prompt for first, _, _, prompt in rows) / len(rows),
        sum(later) / len(later) if later else nan,
    )
    assert found == pytest.approx(expected, nan_ok=True)
    shares = LatencySlo(per_token_s=0.5, input_s=2.0, output_s=4.0).shares(found)
    over = (2 * expected[0], expected[1] / 2, expected[2] / 4)
    assert shares == pytest.approx(over, nan_ok=True)


def test_nobody_has_no_latency() -> None:
    empty = times_of([(1.0, 1.0, 1)])
    none = RequestTimes._make(column[:0] for column in empty)
    assert length_latencies(none, np.zeros(0, np.int64)) == pytest.approx([nan] * 3, nan_ok=True)


def test_prompts_are_those_of_the_requests_that_count() -> None:
    trace = serve(recorded([(0.0, 5, 3), (0.0, 70, 2), (9.0, 8, 1)]), Continuous())
    times = request_times(trace)
    odd = RequestTimes._make(column[[0, 2]] for column in times)
    assert prompt_tokens_of(trace, times).tolist() == [5, 70, 8]
    assert prompt_tokens_of(trace, odd).tolist() == [5, 8]


def test_a_long_prompt_may_take_25_times_its_unloaded_prefill_and_a_short_one_15_seconds() -> None:
    base = load_scaling("lwm_7b_a800_tp2")
    slo = LengthSlo(scaling=base)
    prompts = np.array([10, 10, 199_999, 199_999, 199_999, 10])
    long_s = 25 * base.prefill_s(4, 199_999, 199_999**2)
    assert long_s > 200
    assert slo.longest_ttft_s(prompts)[[0, 2]].tolist() == [15.0, pytest.approx(long_s)]
    times = times_of(
        [
            (15.0, 15.04, 2),
            (15.01, 15.02, 2),
            (0.999 * long_s, 0.999 * long_s + 0.45, 11),
            (1.001 * long_s, 1.001 * long_s, 1),
            (1.0, 1.06, 2),
            (1.0, 1.0, 1),
        ]
    )
    assert slo.met(times, prompts).tolist() == [True, False, True, False, False, True]
    assert slo.attainment(times, prompts) == 0.5


def test_slos_of_the_datasets_are_25_times_an_unloaded_latency_of_some_milliseconds() -> None:
    assert set(LOONGSERVE_SLOS) == set(Dataset)
    unloaded_s = [slo.output_s / 25 for slo in LOONGSERVE_SLOS.values()]
    assert unloaded_s == pytest.approx([0.0128, 0.0128, 0.0146, 0.0144])


def test_slos_that_nothing_meets_are_refused() -> None:
    base = load_scaling("lwm_7b_a800_tp8")
    with pytest.raises(ValueError, match="input_s=0 must be positive"):
        LatencySlo(per_token_s=1.0, input_s=0, output_s=1.0)
    with pytest.raises(ValueError, match="tpot_s=nan must be positive and finite"):
        LengthSlo(scaling=base, degree=1, tpot_s=nan)
    with pytest.raises(ValueError, match="degree=4 is not in scaling base lwm_7b_a800_tp8"):
        LengthSlo(scaling=base)
