"""Generated workloads against closed forms, at fixed seeds."""

import math
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.workload.arrivals import Stage
from sim.workload.base import RequestColumns, Workload
from sim.workload.closed_loop import ClosedLoop, ThinkTimes
from sim.workload.default import Default
from sim.workload.gamma import Gamma
from sim.workload.lengths import LengthDistribution
from sim.workload.poisson import Poisson

TOKENS = {"input_tokens": 566, "output_tokens": 247}
SIGMAS = 4.0


def _all(workload: Workload, seed: int = 1, **chunking: int) -> RequestColumns:
    chunks = list(workload.columns(seed, **chunking))
    return RequestColumns(
        *(
            np.concatenate([getattr(chunk, name) for chunk in chunks])
            for name in ("arrival_s", "prompt_tokens", "output_tokens")
        )
    )


def _assert_same(left: RequestColumns, right: RequestColumns) -> None:
    for name in ("arrival_s", "prompt_tokens", "output_tokens"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))


@pytest.mark.parametrize("cv", [0.3, 1.0, 3.0])
def test_gaps_have_the_stated_rate_and_cv(cv: float) -> None:
    count, rate_per_s = 200_000, 8.0
    workload = Gamma(rate_per_s=rate_per_s, burstiness_cv=cv, num_requests=count, **TOKENS)
    gaps = np.diff(_all(workload).arrival_s, prepend=0.0) * rate_per_s
    assert abs(gaps.mean() - 1) < SIGMAS * cv / math.sqrt(count)
    # The fourth central moment of a gamma variable of mean 1 is 3 cv**4 + 6 cv**6.
    variance_error = math.sqrt((2 * cv**4 + 6 * cv**6) / count)
    assert abs(gaps.var() - cv**2) < SIGMAS * variance_error


def test_poisson_counts_have_variance_equal_to_mean() -> None:
    arrivals = _all(Poisson(rate_per_s=5.0, duration_s=20_000.0, **TOKENS)).arrival_s
    counts = np.bincount(arrivals.astype(int), minlength=20_000)
    assert abs(counts.mean() - 5.0) < SIGMAS * math.sqrt(5.0 / 20_000)
    assert counts.var() == pytest.approx(5.0, rel=SIGMAS * math.sqrt(2.2 / 20_000))


def test_duration_ends_arrivals_and_keeps_the_earlier_ones() -> None:
    short = _all(Poisson(rate_per_s=3.0, duration_s=50.0, **TOKENS)).arrival_s
    long = _all(Poisson(rate_per_s=3.0, duration_s=100.0, **TOKENS)).arrival_s
    np.testing.assert_array_equal(short, long[long < 50.0])
    assert np.all(np.diff(long) >= 0)


@pytest.mark.parametrize("cv", [None, 2.0])
def test_each_stage_has_its_own_rate(cv: float | None) -> None:
    stages = [Stage(rate_per_s=r, duration_s=d) for r, d in ((5, 2e3), (0, 1e3), (20, 2e3))]
    kind = Poisson(stages=stages, **TOKENS)
    workload = kind if cv is None else Gamma(stages=stages, burstiness_cv=cv, **TOKENS)
    arrivals = _all(workload).arrival_s
    counts, _ = np.histogram(arrivals, [0, 2e3, 3e3, 5e3])
    expected = np.array([10_000, 0, 40_000])
    assert np.all(np.abs(counts - expected) <= SIGMAS * (cv or 1.0) * np.sqrt(expected))
    assert np.all(np.diff(arrivals) >= 0)


def test_one_stage_is_the_constant_rate() -> None:
    stage = Poisson(stages=[Stage(rate_per_s=3.0, duration_s=80.0)], **TOKENS)
    _assert_same(_all(stage), _all(Poisson(rate_per_s=3.0, duration_s=80.0, **TOKENS)))


@pytest.mark.parametrize(
    ("lengths", "stated_cv", "cv"),
    [
        ("fixed", None, 0.0),
        ("uniform", 0.4, 0.4),
        ("exponential", None, 1),
        ("lognormal", 0.8, 0.8),
    ],
)
def test_lengths_have_the_stated_mean_and_cv(
    lengths: str, stated_cv: float | None, cv: float
) -> None:
    count = 200_000
    workload = Poisson(
        rate_per_s=1.0,
        num_requests=count,
        lengths=LengthDistribution[lengths],
        length_cv=stated_cv,
        **TOKENS,
    )
    columns = _all(workload)
    for drawn, mean in ((columns.prompt_tokens, 566), (columns.output_tokens, 247)):
        # Rounding exponential lengths up to one token moves the mean by less than 1 / (8 mean).
        assert abs(drawn.mean() - mean) <= SIGMAS * cv * mean / math.sqrt(count) + 1 / mean
        assert drawn.std() / mean == pytest.approx(cv, abs=0.02)
        assert drawn.min() >= 1


def test_limits_hold_and_a_stated_answer_limit_ends_answers() -> None:
    workload = Poisson(
        rate_per_s=1.0,
        num_requests=5000,
        lengths=LengthDistribution.lognormal,
        length_cv=3.0,
        min_tokens=50,
        max_tokens=900,
        max_output_tokens=300,
        **TOKENS,
    )
    columns = _all(workload)
    assert (columns.prompt_tokens.min(), columns.prompt_tokens.max()) == (50, 900)
    assert (columns.output_tokens.min(), columns.output_tokens.max()) == (50, 300)


def test_changing_one_source_of_chance_leaves_the_others_bit_equal() -> None:
    base = _all(Poisson(rate_per_s=2.0, num_requests=1000, **TOKENS))
    spread = {"lengths": LengthDistribution.lognormal, "length_cv": 1.0}
    drawn = _all(Poisson(rate_per_s=2.0, num_requests=1000, **TOKENS, **spread))
    faster = _all(Poisson(rate_per_s=4.0, num_requests=1000, **TOKENS, **spread))
    longer = {**TOKENS, "output_tokens": 999}
    longer_answers = _all(Poisson(rate_per_s=2.0, num_requests=1000, **longer, **spread))
    np.testing.assert_array_equal(base.arrival_s, drawn.arrival_s)
    np.testing.assert_array_equal(drawn.prompt_tokens, faster.prompt_tokens)
    np.testing.assert_array_equal(drawn.prompt_tokens, longer_answers.prompt_tokens)
    assert abs(np.corrcoef(drawn.prompt_tokens, drawn.output_tokens)[0, 1]) < 0.15


LAWS = [
    Default(),
    Poisson(rate_per_s=2.0, num_requests=300, lengths=LengthDistribution.exponential, **TOKENS),
    Poisson(rate_per_s=2.0, duration_s=150.0, **TOKENS),
    Gamma(
        stages=[Stage(rate_per_s=1, duration_s=90), Stage(rate_per_s=4, duration_s=50)],
        burstiness_cv=2.5,
        lengths=LengthDistribution.lognormal,
        length_cv=1.0,
        **TOKENS,
    ),
    ClosedLoop(
        num_clients=7,
        num_requests=300,
        think_time_s=1.0,
        think_times=ThinkTimes.exponential,
        lengths=LengthDistribution.uniform,
        length_cv=0.5,
        **TOKENS,
    ),
]


@pytest.mark.parametrize("workload", LAWS, ids=lambda w: type(w).__name__)
def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(workload: Workload) -> None:
    before = repr(workload)
    _assert_same(_all(workload, 5), _all(workload, 5))
    assert _all(workload, 5).arrival_s.tobytes() != _all(workload, 6).arrival_s.tobytes()
    assert repr(workload) == before


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(LAWS), st.integers(1, 400), st.integers(0, 9))
def test_chunk_size_changes_no_value(workload: Workload, chunk_rows: int, seed: int) -> None:
    assert all(len(c) <= chunk_rows for c in workload.columns(seed, chunk_rows))
    _assert_same(_all(workload, seed), _all(workload, seed, chunk_rows=chunk_rows))


@pytest.mark.parametrize("num_clients", [None, 1000])
def test_a_million_requests_are_quick_and_use_flat_memory(num_clients: int | None) -> None:
    spread = {"lengths": LengthDistribution.lognormal, "length_cv": 1.0, "num_requests": 10**6}
    if num_clients is None:
        workload = Gamma(rate_per_s=10.0, burstiness_cv=2.0, **TOKENS, **spread)
    else:
        workload = ClosedLoop(num_clients=num_clients, **TOKENS, **spread)
    start_s = time.process_time()
    assert sum(len(chunk) for chunk in workload.columns(1)) == 10**6
    assert time.process_time() - start_s < 2.0
    tracemalloc.start()
    for _ in workload.columns(1):
        pass
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # A chunk is 0.5 MB a column; all million rows would be 24 MB.
    assert peak_bytes < 8e6
