"""Max-min fair rates against a linear programme that raises the slowest flow first."""

from itertools import pairwise

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from sim.state.flow_classes import flow_classes
from sim.state.max_min import max_min_rates


def incidence(paths, num_links):
    """Flows that cross each link. Shape: links, flows."""
    matrix = np.zeros((num_links, len(paths)))
    for flow, path in enumerate(paths):
        for link in path:
            matrix[link, flow] += 1
    return matrix


def by_filling(matrix, capacity):
    link, flow = np.nonzero(matrix)
    return max_min_rates(capacity, flow, link, matrix[link, flow], matrix.shape[1])


def by_linear_programmes(matrix, capacity):
    """Lexicographic: the largest common rate; who cannot exceed it is fixed; again for the rest."""
    num_flows = matrix.shape[1]
    fixed = np.full(num_flows, np.nan)
    while np.isnan(fixed).any():
        free = np.isnan(fixed)
        bounds = [(0, None) if f else (r, r) for f, r in zip(free, fixed, strict=True)]
        # Variables: the rates, and t, which every free rate must reach.
        reach = np.hstack([-np.eye(num_flows)[free], np.ones((free.sum(), 1))])
        fits = np.hstack([matrix, np.zeros((len(capacity), 1))])
        bound = np.concatenate([capacity, np.zeros(free.sum())])
        goal = np.append(np.zeros(num_flows), -1.0)
        found = linprog(goal, np.vstack([fits, reach]), bound, bounds=[*bounds, (0, None)])
        level = -found.fun
        at_least = [
            (level * (1 - 1e-9), None) if f else b for f, b in zip(free, bounds, strict=True)
        ]
        stuck = [
            flow
            for flow in np.flatnonzero(free)
            if -linprog(-np.eye(num_flows)[flow], matrix, capacity, bounds=at_least).fun
            <= level * (1 + 1e-6)
        ]
        assert stuck
        fixed[stuck] = level
    return fixed


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_rates_equal_the_lexicographic_linear_programme_on_random_graphs(seed):
    rng = np.random.default_rng(seed)
    size = int(rng.integers(3, 8))
    graph = networkx.gnp_random_graph(size, 0.5, seed=int(seed)).to_directed()
    networkx.add_cycle(graph, range(size))
    links = {edge: i for i, edge in enumerate(graph.edges)}
    capacity = rng.choice([1.0, 2.0, 2.5, 10.0], len(links))
    paths = []
    for _ in range(int(rng.integers(1, 9))):
        a, b = rng.choice(size, 2, replace=False)
        way = networkx.shortest_path(graph, int(a), int(b))
        paths.append([links[pair] for pair in pairwise(way)])
    matrix = incidence(paths, len(links))
    got = by_filling(matrix, capacity)
    assert got == pytest.approx(by_linear_programmes(matrix, capacity), rel=1e-5)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_every_flow_has_a_full_link_on_which_none_is_faster(seed):
    """Bertsekas and Gallager: this is what makes an allocation max-min fair."""
    rng = np.random.default_rng(seed)
    matrix = (rng.random((rng.integers(1, 30), rng.integers(1, 60))) < 0.2).astype(float)
    matrix = matrix[:, matrix.any(axis=0)]
    capacity = rng.integers(1, 5, len(matrix)).astype(float)
    rates = by_filling(matrix, capacity)
    load = matrix @ rates
    assert (load <= capacity * (1 + 1e-9)).all()
    full = load >= capacity * (1 - 1e-9)
    for flow, rate in enumerate(rates):
        mates = [
            rates[matrix[link] > 0].max() for link in np.flatnonzero(full & (matrix[:, flow] > 0))
        ]
        assert mates
        assert min(mates) <= rate * (1 + 1e-9)


def test_a_flow_over_no_link_is_unlimited_and_one_over_a_dead_link_stands():
    rates = max_min_rates(np.array([0.0]), np.array([1]), np.array([0]), np.array([1.0]), 2)
    assert rates.tolist() == [np.inf, 0.0]


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_flows_of_one_class_have_one_rate(seed):
    """Random unions of symmetric patterns: each pattern is drawn, copied and its copies joined."""
    rng = np.random.default_rng(seed)
    num_links, copies = int(rng.integers(1, 6)), int(rng.integers(1, 5))
    paths = [
        rng.choice(num_links, int(rng.integers(1, num_links + 1)), replace=False)
        for _ in range(int(rng.integers(1, 6)))
    ]
    shared = rng.random(num_links) < 0.3  # these links are common to all copies
    rows = [
        [int(link) if shared[link] else int(link) + num_links * copy for link in path]
        for copy in range(copies)
        for path in paths
    ]
    capacity = np.tile(rng.choice([1.0, 3.0], num_links), copies)
    width = max(len(row) for row in rows)
    padded = np.array([row + [-1] * (width - len(row)) for row in rows])
    classes = flow_classes(padded, np.ones(len(rows)), capacity)
    assert classes.of_flow.max() + 1 <= len(paths)
    rates = by_filling(incidence(rows, len(capacity)), capacity)
    for number in range(classes.of_flow.max() + 1):
        assert np.ptp(rates[classes.of_flow == number]) <= 1e-9


def test_size_and_capacity_part_classes():
    paths, capacity = np.array([[0], [1], [2]]), np.array([1.0, 1.0, 2.0])
    assert len(set(flow_classes(paths, np.ones(3), capacity).of_flow.tolist())) == 2
    assert len(set(flow_classes(paths, np.array([1.0, 2, 3]), capacity).of_flow.tolist())) == 3
