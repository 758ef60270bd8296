"""Who leaves the cache: hits against a library's caches, priorities and clocks by hand."""

from collections import Counter

import cachetools
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import RegularGridInterpolator

from sim.policies.cache_eviction.base import BoundEviction
from sim.policies.estimate import PrefillProfile
from sim.policies.registry import policies
from sim.requests import RequestView
from sim.state.knowledge_node import NodeView, Tier
from sim.state.knowledge_prefixes import KnowledgePrefixes
from sim.state.knowledge_tree import KnowledgeTree

BLOCK = 4
QUESTION = 1


class _Cache:
    """Documents asked for one at a time, on a GPU tier of so many blocks."""

    def __init__(self, rule, gpu_blocks, *, host_blocks=0, lengths=None, cost_s=None):
        bound = BoundEviction(policies("cache_eviction")[rule]())
        self.lengths = lengths or [BLOCK] * 1000
        self.tree = KnowledgeTree(bound, host_blocks)
        cost_s = cost_s or (lambda cached, new: 1.0)
        self.prefixes = KnowledgePrefixes(self.tree, BLOCK, self.lengths, 0, cost_s)
        self.gpu_blocks, self.count = gpu_blocks, 0

    def ask(self, *documents):
        """Returns whether all were cached."""
        number, tokens = self.count, sum(self.lengths[one] for one in documents)
        self.count += 1
        view = RequestView(number, 0.0, tokens + QUESTION, 1)
        self.prefixes.register(number, documents)
        found = self.prefixes.hold(view).tokens
        self.prefixes.shrink(self.gpu_blocks - tokens // BLOCK)
        self.prefixes.store(number, tokens)
        assert self.tree.gpu_used <= self.gpu_blocks
        self.prefixes.release(number)
        return found == tokens

    def node(self, *documents):
        node = self.tree.root
        for document in documents:
            node = node.child(document)
        return node


def _hits_of(cache, trace):
    """Of a cache of the library."""
    hits = []
    for document in trace:
        hits.append(document in cache)
        cache[document] = cache.get(document, True)
    return hits


def _lfu_hits(capacity, trace):
    """The least used leaves; of these, the one used longest ago."""
    uses, last, hits = Counter(), {}, []
    for now, document in enumerate(trace):
        hits.append(document in uses)
        if document not in uses and len(uses) == capacity:
            del uses[min(uses, key=lambda one: (uses[one], last[one]))]
        uses[document] += 1
        last[document] = now
    return hits


TRACES = st.lists(st.integers(0, 9), max_size=120)


@settings(max_examples=60, deadline=None)
@given(trace=TRACES, capacity=st.integers(1, 8))
def test_lru_hits_where_that_of_a_library_does(trace, capacity):
    ours = _Cache("lru", capacity)
    library = cachetools.LRUCache(capacity)
    assert [ours.ask(document) for document in trace] == _hits_of(library, trace)


@settings(max_examples=60, deadline=None)
@given(trace=TRACES, capacity=st.integers(1, 8))
def test_lfu_hits_where_the_least_used_longest_ago_leaves(trace, capacity):
    ours = _Cache("lfu", capacity)
    assert [ours.ask(document) for document in trace] == _lfu_hits(capacity, trace)


@pytest.mark.parametrize("skew", [1.1, 1.6])
@pytest.mark.parametrize("rule", ["lru", "lfu"])
def test_hits_of_skewed_requests_are_those_of_a_library(rule, skew):
    trace = (np.random.default_rng(7).zipf(skew, 2000) % 100).tolist()
    library = {"lru": cachetools.LRUCache, "lfu": cachetools.LFUCache}[rule]
    for capacity in (2, 7, 30):
        ours = _Cache(rule, capacity)
        assert sum(map(ours.ask, trace)) == sum(_hits_of(library(capacity), trace))


def test_lfu_counts_anew_once_a_document_has_left():
    ours = _Cache("lfu", 1)
    for _ in range(5):
        ours.ask(0)
    assert ours.node(0).view().uses == 5
    ours.ask(1)
    ours.ask(0)
    assert ours.node(0).view().uses == 1
    assert ours.node(0).view().frequency == 6


def test_gdsf_priorities_by_hand():
    ours = _Cache("gdsf", 2)
    for document in (0, 1, 0):
        ours.ask(document)
    assert (ours.node(0).gpu_priority, ours.node(1).gpu_priority) == (2.0, 1.0)
    ours.ask(2)  # 1 leaves with 1, and so the clock is 1
    assert not ours.node(1).cached
    assert ours.node(2).gpu_priority == 1 + 1
    ours.ask(3)  # 0 and 2 are worth 2 each, and 0 was used longer ago
    assert not ours.node(0).cached
    assert ours.node(3).gpu_priority == 2 + 1
    ours.ask(0)  # 2 leaves with 2; the third use of 0 counts, though it was not cached
    assert not ours.node(2).cached
    assert ours.node(0).gpu_priority == 2 + 3


@pytest.mark.parametrize(("rule", "cost_s"), [("gdsf", 9.0), ("pgdsf", float(BLOCK + QUESTION))])
def test_the_clock_of_the_host_runs_by_itself(rule, cost_s):
    ours = _Cache(rule, 1, host_blocks=1, cost_s=lambda cached, new: cost_s)
    for document in (0, 0, 1):
        ours.ask(document)
    # 0 has left the GPU with 2, but its copy is valued by the clock of the host.
    assert (ours.node(1).gpu_priority, ours.node(0).host_priority) == (2 + 1, 0 + 2)
    ours.ask(2)
    # 1 has left the GPU with 3, and 0 the host with 2 for it.
    assert not ours.node(0).cached
    assert (ours.node(2).gpu_priority, ours.node(1).host_priority) == (3 + 1, 2 + 1)


def test_a_clock_never_goes_back():
    rule = BoundEviction(policies("cache_eviction")["gdsf"]())
    node = NodeView(last_use=1, uses=1, frequency=1, average_cost_s=9.0)
    for left, clock in ((2.0, 2.0), (1.0, 2.0), (5.0, 5.0)):
        rule.evicted(Tier.host, left)
        assert rule.priority(Tier.host, node) == clock + 1
        assert rule.priority(Tier.gpu, node) == 1


def test_pgdsf_averages_over_the_requests_that_had_to_compute():
    seconds = {(0, 9): 18.0, (4, 5): 20.0, (8, 1): 99.0}
    ours = _Cache("pgdsf", 2, cost_s=lambda cached, new: seconds[cached, new])
    ours.ask(0, 1)  # both are missed, at 18 / 9 s a token
    assert ours.node(0).view().average_cost_s == ours.node(0, 1).view().average_cost_s == 2.0
    ours.ask(0, 1)  # a hit costs nothing, and counts as a use
    assert ours.node(0, 1).gpu_priority == 2 * 2.0
    ours.ask(0, 2)  # 1 leaves with 4; 2 behind 0 is missed at 20 / 5
    assert ours.node(0, 2).gpu_priority == 4.0 + 1 * 4.0
    assert ours.node(0).gpu_priority == 3 * 2.0
    ours.ask(0, 1)  # 2 leaves with 8; 1 is missed at 4 s a token, 3 on average, at its third use
    assert ours.node(0, 1).view().average_cost_s == (2.0 + 4.0) / 2
    assert ours.node(0, 1).gpu_priority == 8.0 + 3 * 3.0


def test_pgdsf_keeps_what_is_dearer_a_token_and_gdsf_does_not():
    lengths = [4, 40, 4]
    left = {}
    for rule in ("gdsf", "pgdsf"):
        # 100 s to begin with: the short document costs 21 s a token, the long one 3.4.
        ours = _Cache(rule, 11, lengths=lengths, cost_s=lambda cached, new: 100.0 + new)
        for document in (0, 1, 2):
            ours.ask(document)
        left[rule] = [one for one in (0, 1) if not ours.node(one).cached]
    assert left == {"gdsf": [0], "pgdsf": [1]}


@st.composite
def _grids(draw):
    axes = [
        sorted(draw(st.sets(st.integers(0, 500), min_size=2, max_size=6))) for _ in range(2)
    ]  # fmt: skip
    second = st.floats(0, 10)
    rows = [[draw(second) for _ in axes[1]] for _ in axes[0]]
    return axes[0], axes[1], rows


@settings(max_examples=40, deadline=None)
@given(grid=_grids(), chance=st.randoms())
def test_a_profile_is_exact_on_its_grid_and_as_that_of_scipy_between(grid, chance):
    cached, new, rows = grid
    profile = PrefillProfile(cached, new, rows)
    for at, before in enumerate(cached):
        for to, after in enumerate(new):
            assert profile.seconds(before, after) == pytest.approx(rows[at][to], abs=1e-12)
    wanted = RegularGridInterpolator((cached, new), np.array(rows), method="linear")
    for _ in range(10):
        point = chance.randint(cached[0], cached[-1]), chance.randint(new[0], new[-1])
        assert profile.seconds(*point) == pytest.approx(float(wanted(point)), abs=1e-9)


@pytest.mark.parametrize(
    ("cached", "new", "message"),
    [
        ([0], [0, 1], r"cached_tokens=\[0\] must be two or more and increase"),
        ([0, 1], [3, 3], r"new_tokens=\[3, 3\] must be two or more and increase"),
        ([5, 1], [0, 1], r"cached_tokens=\[5, 1\] must be two or more and increase"),
        ([0, 1, 2], [0, 1], r"seconds have shape \(2, 2\) and must have \(3, 2\)"),
    ],
)
def test_a_broken_grid_is_refused(cached, new, message):
    with pytest.raises(ValueError, match=message):
        PrefillProfile(cached, new, [[0.0, 1.0], [2.0, 3.0]])


@pytest.mark.parametrize("most", [1, 2, 100, 4096])
def test_a_measured_profile_knows_a_cost_that_is_linear(most):
    profile = PrefillProfile.measured(lambda cached, new: 2.0 * new + cached * new / 64, most)
    for cached in range(0, most + 1, max(most // 7, 1)):
        for new in range(0, most + 1, max(most // 5, 1)):
            assert profile.seconds(cached, new) == pytest.approx(2.0 * new + cached * new / 64)
