"""Intervals of a difference: scipy's own as the reference, and what pairing is for."""

import numpy as np
import pytest
from scipy import stats

from sim.differences import difference

rng = np.random.default_rng(3)
ONES, OTHERS = rng.normal(5, 1, 6), rng.normal(5.4, 2, 9)


def test_unpaired_is_welchs_interval():
    found = difference(ONES.tolist(), OTHERS.tolist(), paired=False)
    reference = stats.ttest_ind(OTHERS, ONES, equal_var=False).confidence_interval(0.95)
    assert found.mean - found.half == pytest.approx(reference.low)
    assert found.mean + found.half == pytest.approx(reference.high)


def test_paired_is_students_interval_of_the_differences():
    found = difference(ONES.tolist(), OTHERS[:6].tolist(), paired=True)
    reference = stats.ttest_rel(OTHERS[:6], ONES).confidence_interval(0.95)
    assert found.mean - found.half == pytest.approx(reference.low)
    assert found.mean + found.half == pytest.approx(reference.high)


def test_pairing_removes_what_both_share():
    shared = rng.normal(0, 10, 8)
    ones, others = (shared + 1.0).tolist(), (shared + 1.5 + rng.normal(0, 0.01, 8)).tolist()
    paired, welch = (difference(ones, others, paired=p) for p in (True, False))
    assert paired.mean == pytest.approx(welch.mean)
    assert paired.half < 0.01 * welch.half


def test_a_single_seed_has_no_interval_and_equal_seeds_differ_by_nothing():
    assert difference([1.0], [3.0], paired=True) == (2.0, None)
    assert difference([1.0], [3.0, 4.0], paired=False) == (2.5, None)
    assert difference([2.0, 2.0], [2.0, 2.0], paired=False) == (0.0, 0.0)
