"""Requests that find their documents cached go first, and nobody waits for ever."""

from collections import Counter, deque
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.engine import ReplicaLimits
from sim.policies.cache_eviction.base import BoundEviction
from sim.policies.registry import policies
from sim.policies.request_order.base import RequestOrder, Waiting, in_order
from sim.policies.request_order.cache_aware import CacheAware
from sim.policies.request_order.fcfs import Fcfs
from sim.queue_order import QueueOrder
from sim.requests import RequestView
from sim.state.knowledge_prefixes import KnowledgePrefixes
from sim.state.knowledge_tree import KnowledgeTree
from sim.state.prefix_cache import NOTHING_CACHED, CachedPrefix
from sim.state.replica_state import ReplicaState

PROMPT = 100


def _make_view(number, generated=0):
    return RequestView(number, float(number), PROMPT, 9, generated)


def _make_waiting(*cached):
    return [Waiting(_make_view(number), tokens) for number, tokens in enumerate(cached)]


def _cached_in(tokens):
    return lambda view: CachedPrefix(tokens[view.request_id], 0)


@given(cached=st.lists(st.integers(0, PROMPT - 1), max_size=9))
def test_the_largest_ratio_of_cached_to_computed_tokens_goes_first_and_ties_as_they_came(cached):
    rule = CacheAware()
    order = list(rule.order(rule.init(), _make_waiting(*cached)))
    ranks = [(-cached[one] / (PROMPT - cached[one]), one) for one in order]
    assert ranks == sorted(ranks)
    assert sorted(order) == list(range(len(cached)))


def test_it_is_the_ratio_that_counts_and_not_the_cached_tokens():
    short, long = (RequestView(at, 0.0, tokens, 1) for at, tokens in enumerate((10, 1000)))
    rule = CacheAware()
    assert list(rule.order({}, [Waiting(long, 400), Waiting(short, 5)])) == [1, 0]


@settings(max_examples=150)
@given(
    window=st.integers(1, 5),
    seats=st.integers(1, 3),
    arrivals=st.lists(st.lists(st.integers(0, PROMPT - 1), max_size=4), max_size=40),
)
def test_nobody_is_overtaken_in_more_decisions_than_the_window_allows(window, seats, arrivals):
    rule = CacheAware(window=window)
    memory = rule.init()
    cached, waiting, overtaken = {}, [], Counter()
    for some in [*arrivals, *[[]] * 200]:
        for tokens in some:
            waiting.append(len(cached))
            cached[len(cached)] = tokens
        queue = in_order(rule, memory, [_make_view(one) for one in waiting], _cached_in(cached))
        admitted = sorted(one.request_id for one in queue[:seats])
        waiting = [one for one in waiting if one not in admitted]
        for late in waiting:
            overtaken[late] += sum(one > late for one in admitted)
        if admitted:
            rule.admitted(memory, admitted, waiting)
    assert not waiting
    # Seats that are given at once may all go to later requests the last time.
    assert max(overtaken.values(), default=0) <= window + seats - 1
    assert not memory, "who was admitted is not remembered"


def test_who_was_overtaken_often_enough_goes_first():
    rule = CacheAware(window=2)
    memory = rule.init()
    for newest in (1, 2):
        waiting = [Waiting(_make_view(0), 0), Waiting(_make_view(newest), 50)]
        assert list(rule.order(memory, waiting)) == [1, 0]
        rule.admitted(memory, [newest], [0])
    assert list(rule.order(memory, [Waiting(_make_view(0), 0), Waiting(_make_view(3), 50)])) == [
        0, 1,
    ]  # fmt: skip


@pytest.mark.parametrize(("order", "hits"), [(Fcfs(), 0), (CacheAware(), 4)])
def test_the_toy_of_the_paper_hits_two_thirds_where_requests_are_ordered(order, hits):
    tree = KnowledgeTree(BoundEviction(policies("cache_eviction")["lru"]()), 0)
    prefixes = KnowledgePrefixes(tree, 4, [4, 4], 0, lambda cached, new: 1.0)
    queue = [RequestView(number, 0.0, 5, 1) for number in range(6)]
    for view in queue:
        prefixes.register(view.request_id, (view.request_id % 2,))
    memory, found = order.init(), 0
    while queue:
        first, *queue = in_order(order, memory, queue, prefixes.cached)
        cached = prefixes.hold(first).tokens
        found += cached > 0
        prefixes.shrink(0)  # there is room for one document
        prefixes.store(first.request_id, 4)
        prefixes.release(first.request_id)
        order.admitted(memory, [first.request_id], sorted(one.request_id for one in queue))
    assert found == hits


def test_who_was_pre_empted_stays_in_front_as_it_is():
    queue = [_make_view(7, 3), _make_view(2, 1), _make_view(0), _make_view(1)]
    cached = {0: 0, 1: 50, 2: 0, 7: 0}
    rule = CacheAware()
    ordered = in_order(rule, rule.init(), queue, _cached_in(cached))
    assert [one.request_id for one in ordered] == [7, 2, 1, 0]


def test_an_order_does_not_depend_on_the_order_before():
    views = [_make_view(number) for number in range(3)]
    cached = dict.fromkeys(range(3), 10)
    for queue in (views, views[::-1], [views[1], views[2], views[0]]):
        assert in_order(CacheAware(), {}, queue, _cached_in(cached)) == views
        assert in_order(Fcfs(), None, queue, _cached_in(cached)) == views


@dataclass(kw_only=True)
class _Broken(RequestOrder):
    answer: tuple[int, ...] = ()

    def order(self, memory, waiting):
        return self.answer


@pytest.mark.parametrize("answer", [(), (0,), (0, 0), (0, 1, 2), (1, 2)])
def test_a_rule_that_loses_or_doubles_a_request_is_refused(answer):
    queue = [_make_view(0), _make_view(1)]
    with pytest.raises(ValueError, match=r"_Broken orders 2 requests as .* mend the policy"):
        in_order(_Broken(answer=answer), None, queue, lambda view: NOTHING_CACHED)


def test_a_window_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"window=0 must be at least 1 overtake; try 32"):
        CacheAware(window=0)


@dataclass(kw_only=True)
class _Noted(RequestOrder):
    """As they came; notes whom it is told of."""

    def init(self):
        return []

    def order(self, memory, waiting):
        return range(len(waiting))

    def admitted(self, memory, admitted, waiting):
        memory.append((list(admitted), list(waiting)))


def test_who_was_stopped_while_it_waited_has_overtaken_nobody():
    order = QueueOrder(_Noted())
    state = ReplicaState(ReplicaLimits(9, 9, 4, 9))
    for waiting, gone in (([0, 1, 2, 3], set()), ([0, 3], {1}), ([0], set()), ([0], set())):
        state.waiting = deque(_make_view(one) for one in waiting)
        order.arrange(state, gone)
    assert order._memory == [([2], [0, 3]), ([3], [0])]
