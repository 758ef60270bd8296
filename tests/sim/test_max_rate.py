"""The search for the maximum rate against curves whose crossing is known exactly."""

from collections.abc import Callable
from math import inf, isinf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.max_rate import max_rate


def queue(capacity: float, slack: float = 25.0) -> Callable[[float], float]:
    """M/M/1's latency over an SLO of `slack` services: crosses at capacity * (1 - 1 / slack)."""

    def run(rate: float) -> float:
        return capacity / (capacity - rate) / slack if rate < capacity else inf

    return run


@given(
    st.floats(0.01, 1000),
    st.floats(0.05, 15).filter(lambda guess: guess != 1),
    st.sampled_from([2.0, 10.0, 25.0]),
)
def test_the_crossing_of_a_queue_is_found(capacity: float, guess: float, slack: float) -> None:
    exact = capacity * (1 - 1 / slack)
    found = max_rate(queue(capacity, slack), exact * guess)
    assert found.rate_per_s == pytest.approx(exact, rel=0.03)


@pytest.mark.parametrize("guess", [0.8, 0.9, 0.97, 1.1, 1.3])
def test_a_good_guess_needs_few_runs(guess: float) -> None:
    latency = max_rate(queue(10.0), 9.6 * guess)
    attained = max_rate(lambda rate: min((rate / 5) ** 6, 10.0), 5 * guess)
    assert max(latency.num_runs, attained.num_runs) <= 7
    assert attained.rate_per_s == pytest.approx(5, rel=0.01)


@given(st.floats(0.02, 50), st.floats(0.005, 0.3), st.sampled_from([0.0, 0.3, 1.0]))
def test_a_step_is_found_between_two_rates_within_the_tolerance(
    at: float, tolerance: float, below: float
) -> None:
    found = max_rate(lambda rate: below if rate <= at else 7.0, 1.0, tolerance=tolerance)
    kept = max(rate for rate, value in found.curve if value <= 1)
    missed = min(rate for rate, value in found.curve if value > 1)
    assert kept <= at < missed <= kept * (1 + tolerance) * (1 + 1e-6)
    assert kept <= found.rate_per_s <= missed


@given(st.lists(st.floats(0, 3), min_size=40, max_size=40), st.floats(0.5, 2))
def test_of_a_noisy_curve_the_first_sampled_crossing_upwards_is_kept(
    noise: list[float], rise: float
) -> None:
    values = iter(noise)
    found = max_rate(lambda rate: next(values) * rate**rise, 0.05, highest_per_s=50.0)
    above = [place for place, (_, value) in enumerate(found.curve) if value > 1]
    if not above:
        assert isinf(found.rate_per_s)
    elif above[0] == 0:
        assert found.rate_per_s <= found.curve[0][0]
    else:
        (low, below), (high, over) = found.curve[above[0] - 1 : above[0] + 1]
        exact = low + (1 - below) / (over - below) * (high - low)
        assert found.rate_per_s == pytest.approx(exact)


def test_what_never_crosses_is_infinite_and_what_always_does_is_zero() -> None:
    never = max_rate(lambda rate: 0.0, 2.0, highest_per_s=9.0)
    assert (never.rate_per_s, never.curve[-1][0]) == (inf, 9.0)
    always = max_rate(lambda rate: 2.0, 2.0, lowest_per_s=0.5)
    assert (always.rate_per_s, always.curve[0][0]) == (0.0, 0.5)
    assert max_rate(lambda rate: 2.0, 1.0, lowest_per_s=1.0).num_runs == 1


def test_the_bound_scales_the_value() -> None:
    once = max_rate(queue(10.0), 5.0)
    assert max_rate(lambda rate: 3 * queue(10.0)(rate), 5.0, bound=3.0).curve == tuple(
        (rate, pytest.approx(3 * value)) for rate, value in once.curve
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lowest_per_s": 2.0}, r"lowest_per_s=2.0, start_per_s=1.0, .*in this order; correct"),
        ({"highest_per_s": 0.5}, r"highest_per_s=0.5 must be positive"),
        ({"bound": 0.0}, r"bound=0.0 must be positive and finite"),
        ({"tolerance": nan}, r"tolerance=nan must be positive"),
    ],
)
def test_searches_that_cannot_end_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        max_rate(queue(2.0), 1.0, **arguments)


@pytest.mark.parametrize("value", [nan, -0.5])
def test_a_value_that_says_nothing_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=rf"run at 1.0 requests/s gave {value}, .*give infinity"):
        max_rate(lambda rate: value, 1.0)
