"""Batches of a prefill: the dynamic programmes against all partitions, tried one by one."""

from functools import cache
from itertools import combinations
from math import inf

import numpy as np
import pytest
from elastic_cases import paper_base
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware_models.scaling import DecodeScaling, PrefillScaling, ScalingBase
from sim.policies.instance_plan import _elastic_batching as batching
from sim.policies.instance_plan._elastic_batching import Objective, Search, partition


def cost_of(parts, lengths, base, objective):
    total = 0.0
    for part in parts:
        batch = lengths[part.request : part.request_stop]
        took_s = base.prefill_s(
            part.instance_stop - part.instance, sum(batch), sum(one * one for one in batch)
        )
        weight = {"normalised": sum(1 / one for one in batch), "summed": len(batch)}
        total += took_s * weight[objective.value]
    return total


def cuts(count, parts):
    for inner in combinations(range(1, count), parts - 1):
        yield (0, *inner, count)


def by_trying_all(lengths, free, base, objective):
    best = inf
    for used in range(1, len(free) + 1):
        for parts in range(1, min(used, len(lengths)) + 1):
            for at in cuts(used, parts):
                for to in cuts(len(lengths), parts):
                    rows = [batching.Part(to[n], to[n + 1], at[n], at[n + 1]) for n in range(parts)]
                    if all(fits(row, lengths, free, base) for row in rows):
                        best = min(best, cost_of(rows, lengths, base, objective))
    return best


def fits(part, lengths, free, base):
    taken = sum(lengths[part.request : part.request_stop])
    degree = part.instance_stop - part.instance
    return taken <= sum(free[part.instance : part.instance_stop]) and degree <= base.max_degree


@st.composite
def problems(draw, most_requests=6, most_instances=5):
    size = st.one_of(st.integers(1, 300), st.integers(1, 200_000))
    lengths = draw(st.lists(size, min_size=1, max_size=most_requests))
    slots = st.one_of(st.integers(0, 210_000), st.integers(0, 500))
    free = draw(st.lists(slots, min_size=1, max_size=most_instances))
    return sorted(lengths, reverse=True), sorted(free, reverse=True)


def with_degrees(degrees):
    return paper_base(degrees)


@given(problems(), st.integers(1, 6), st.sampled_from(Objective))
@settings(max_examples=150)
def test_the_exact_programmes_equal_trying_all_partitions(problem, degrees, objective):
    lengths, free = problem
    base = with_degrees(degrees)
    least = by_trying_all(lengths, free, base, objective)
    sums = batching._Sums(lengths, free, base, objective)
    for programme in (batching._one_by_one, batching._by_halves):
        cost = programme(sums)[0]
        assert min(row[-1] for row in cost) == pytest.approx(least, rel=1e-9)
    found = partition(lengths, free, base, objective)
    assert (found is None) == (least == inf)
    if found is not None:
        assert cost_of(found.parts, lengths, base, objective) == pytest.approx(least, rel=1e-9)


@given(problems(), st.integers(1, 6), st.sampled_from(Objective), st.sampled_from(Search))
@settings(max_examples=150)
def test_parts_cover_the_requests_follow_each_other_and_fit(problem, degrees, objective, search):
    lengths, free = problem
    base = with_degrees(degrees)
    found = partition(lengths, free, base, objective, search)
    exact = partition(lengths, free, base, objective)
    assert (found is None) == (exact is None), "feasible whenever the exact one is"
    if found is None or exact is None:
        return
    assert found.cost >= exact.cost * (1 - 1e-9)
    assert found.cost == pytest.approx(cost_of(found.parts, lengths, base, objective), rel=1e-9)
    request = instance = 0
    for part in found.parts:
        assert (part.request, part.instance) == (request, instance)
        assert part.request_stop > request
        assert part.instance_stop > instance
        assert fits(part, lengths, free, base)
        request, instance = part.request_stop, part.instance_stop
    assert request == len(lengths)


@pytest.mark.parametrize("count", [40, 117])
@pytest.mark.parametrize("objective", Objective)
def test_halving_equals_all_sums_on_longer_rows(count, objective):
    draws = np.random.default_rng(count)
    base = with_degrees(4)
    for _ in range(4):
        lengths = sorted((draws.zipf(1.3, count) * 10 % 50_000 + 1).tolist(), reverse=True)
        free = sorted(draws.integers(0, 210_000, 6).tolist(), reverse=True)
        sums = batching._Sums(lengths, free, base, objective)
        slow, fast = batching._one_by_one(sums)[0], batching._by_halves(sums)[0]
        assert np.allclose(slow, fast, rtol=1e-10)


def test_the_monotone_version_misses_the_least_where_its_inequality_fails():
    """Otherwise nothing here would tell the two versions apart."""
    draws = np.random.default_rng(3)
    base, missed = with_degrees(4), 0
    for _ in range(200):
        lengths = sorted(draws.integers(10, 100_000, 8).tolist(), reverse=True)
        free = sorted(draws.integers(100_000, 210_000, 4).tolist(), reverse=True)
        exact = partition(lengths, free, base)
        bounded = partition(lengths, free, base, search=Search.monotone)
        if exact is not None and bounded is not None:
            missed += bounded.cost > exact.cost * (1 + 1e-9)
    assert missed


@cache
def linear():
    """Without attention, and without gain from a second instance."""
    return ScalingBase(
        name="line", model="m", device="d", source="by hand",
        prefill=[PrefillScaling(base_s=1.0, token_s=1.0, square_s=0.0)] * 2,
        decode=DecodeScaling(base_s=1, request_s=0, master_request_s=0, context_token_s=0),
    )  # fmt: skip


def test_two_equal_requests_run_apart_where_degree_gains_nothing():
    """Together: (1 + 2) s for both. Apart: (1 + 1) s each."""
    found = partition([1, 1], [9, 9], linear(), Objective.summed)
    assert found == (4.0, ((0, 1, 0, 1), (1, 2, 1, 2)))


def test_one_that_needs_two_instances_takes_the_freest():
    found = partition([10, 1], [6, 5, 1], linear(), Objective.summed)
    assert found is not None
    assert found.parts == ((0, 1, 0, 2), (1, 2, 2, 3))


def test_what_fits_nowhere_has_no_partition():
    assert partition([10], [6, 3], linear()) is None
    assert partition([10], [4, 4, 4], linear()) is None, "three instances are not known"
    assert partition([], [4], linear()) is None
