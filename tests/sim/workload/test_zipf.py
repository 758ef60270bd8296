"""Popularity by rank: the exponents of the paper's notes, and the head that they were fitted to."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.workload.zipf import Zipf, zipf_exponent


@pytest.mark.parametrize(
    ("num_items", "exponent"),
    [(1_000, 1.073), (5_000, 0.986), (14_000, 0.954), (100_000, 0.916), (300_000, 0.9025)],
)
def test_the_exponent_for_three_percent_that_get_sixty(num_items: int, exponent: float) -> None:
    assert zipf_exponent(num_items, 0.03, 0.6) == pytest.approx(exponent, abs=5e-4)


@given(
    num_items=st.integers(20, 3000),
    share=st.floats(0.05, 0.9),
    more=st.floats(0.01, 0.95),
)
def test_the_head_gets_what_was_asked(num_items: int, share: float, more: float) -> None:
    requests = share + more * (1 - share)
    weights = np.arange(1, num_items + 1) ** -zipf_exponent(num_items, share, requests)
    up_to = np.concatenate(([0.0], np.cumsum(weights))) / weights.sum()
    head = np.interp(share * num_items, np.arange(num_items + 1), up_to)
    assert head == pytest.approx(requests, abs=1e-9)


def test_equal_shares_are_uniform_whatever_the_size() -> None:
    assert zipf_exponent(1, 0.5, 0.5) == zipf_exponent(10, 0.03, 0.03) == 0.0
    assert zipf_exponent(1000, 1.0, 1.0) == 0.0


@pytest.mark.parametrize(
    ("num_items", "share", "requests", "message"),
    [
        (100, 0.0, 0.5, r"popular_share=0.0 and popular_requests=0.5 must be above 0.*; try"),
        (100, 0.3, 0.2, r"the requests not below the share"),
        (100, 0.3, 1.0, r"popular_requests=1.0 must be above 0 and below 1"),
        (100, float("nan"), 0.5, r"popular_share=nan"),
        (10, 0.03, 0.6, r"popular_share=0.03 of num_documents=10 .*; try popular_share=0.1"),
    ],
)
def test_heads_that_no_falling_popularity_has_are_refused(
    num_items: int, share: float, requests: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        zipf_exponent(num_items, share, requests)


@given(num_items=st.integers(1, 500), exponent=st.floats(0.0, 2.0))
def test_ranks_invert_the_cumulative_popularity(num_items: int, exponent: float) -> None:
    zipf = Zipf(num_items, exponent)
    weights = np.arange(1, num_items + 1) ** -exponent
    starts = (np.cumsum(weights) - weights) / weights.sum()
    middles = starts + weights / weights.sum() / 2
    np.testing.assert_array_equal(zipf.ranks(middles), np.arange(num_items))
    ends = zipf.ranks(np.array([[0.0, np.nextafter(1.0, 0.0)]]))
    assert ends.tolist() == [[0, num_items - 1]]


def test_drawn_ranks_are_as_frequent_as_their_weights() -> None:
    zipf, count = Zipf(5, 1.0), 200_000
    found = np.bincount(zipf.ranks(np.random.default_rng(1).random(count)), minlength=5) / count
    expected = 1 / np.arange(1, 6)
    np.testing.assert_allclose(found, expected / expected.sum(), atol=4 * 0.5 / count**0.5)
