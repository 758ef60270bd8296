"""What holds of the knowledge tree after every step, whatever requests do and the rule decides."""

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
from sim.state.knowledge_tree import KnowledgeTree, MoveKind

RULES = sorted(policies("cache_eviction"))
BLOCK = 16
LENGTHS = [5, 16, 20, 40, 64, 33]
QUESTION = 7


def cost_s(cached, new):
    return 1e-3 + 1e-5 * new + 1e-8 * new * (cached + new / 2)


def make(rule, host_blocks, *, replicate_from=None, system=0):
    tree = KnowledgeTree(
        BoundEviction(policies("cache_eviction")[rule]()), host_blocks, replicate_from
    )
    return KnowledgePrefixes(tree, BLOCK, LENGTHS, system, cost_s)


def view(number, documents, system=0):
    prompt = system + sum(LENGTHS[one] for one in documents) + QUESTION
    return RequestView(number, float(number), prompt, 1)


def require_consistent(prefixes, running):
    tree = prefixes.tree
    held = Counter(node for number in running for node in prefixes.held_nodes(number))
    nodes = list(tree.nodes())
    for node in nodes:
        parent = node.parent
        assert node.pins == held[node]
        assert not node.pins or node.gpu
        assert not node.gpu or parent.gpu, "a parent is in a slower tier than its child"
        assert not node.host or parent is tree.root or parent.gpu or parent.host
        children = list((node.children or {}).values())
        assert node.gpu_children == sum(one.gpu for one in children)
        assert node.cached_children == sum(one.gpu or one.host for one in children)
    assert tree.gpu_used == sum(node.blocks for node in nodes if node.gpu)
    assert tree.host_used == sum(node.blocks for node in nodes if node.host) <= tree.host_blocks
    assert tree.unheld == sum(node.blocks for node in nodes if node.gpu and not node.pins)


def brute_force(prefixes, documents):
    """Blocks of the leading documents that are in any tier."""
    node, blocks = prefixes.tree.root, 0
    for document in documents:
        node = (node.children or {}).get(document)
        if node is None or not (node.gpu or node.host):
            break
        blocks += node.blocks
    return blocks * BLOCK


documents_of = st.lists(st.integers(0, len(LENGTHS) - 1), min_size=1, max_size=3, unique=True)
steps = st.lists(
    st.tuples(st.sampled_from(["admit", "finish", "shrink", "lose"]), documents_of,
              st.integers(0, 20)),
    max_size=60,
)  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=60, deadline=None)
@given(steps=steps, host=st.integers(0, 12), replicate=st.sampled_from([None, 2]))
def test_the_tree_stays_consistent(rule, steps, host, replicate):
    prefixes = make(rule, host, replicate_from=replicate)
    running = []
    copied = set()
    for number, (what, documents, size) in enumerate(steps):
        if what == "admit":
            prefixes.register(number, tuple(documents))
            one = view(number, documents)
            assert prefixes.cached(one).tokens == brute_force(prefixes, documents)
            other, wanted = number + 1000, documents[: 1 + size % 3][::-1]
            prefixes.register(other, tuple(wanted))
            promised = prefixes.cached(view(other, wanted)).tokens
            prefixes.hold(one)
            found = prefixes.cached(view(other, wanted)).tokens
            assert found >= promised, "a request that is admitted takes from another's promise"
            prefixes.store(number, one.prompt_tokens)
            running.append(number)
        elif what == "finish" and running:
            done = running.pop(size % len(running))
            prefixes.release(done)
            prefixes.forget(done)
        elif what == "shrink":
            prefixes.shrink(size)
            assert prefixes.unheld <= size
        elif what == "lose" and not running:
            prefixes.lose_gpu()
            assert prefixes.tree.gpu_used == 0
        require_consistent(prefixes, running)
        for move in prefixes.tree.take_moves():
            if move.kind in (MoveKind.swap_out, MoveKind.replicate):
                assert move.node not in copied, "a document is copied to the host twice"
                copied.add(move.node)
            elif move.kind is MoveKind.forget:
                copied.discard(move.node)
    while running:
        prefixes.release(running.pop())
    prefixes.shrink(0)
    assert prefixes.tree.gpu_used == prefixes.unheld == 0


def flat_hits(rule, trace, capacity):
    """Hits of one request at a time for documents of one block, on the GPU alone."""
    tree = KnowledgeTree(BoundEviction(policies("cache_eviction")[rule]()), 0)
    prefixes = KnowledgePrefixes(tree, BLOCK, [BLOCK] * 1000, 0, cost_s)
    hits = 0
    for number, document in enumerate(trace):
        prefixes.register(number, (document,))
        one = RequestView(number, 0.0, BLOCK + QUESTION, 1)
        cached = prefixes.hold(one).tokens > 0
        hits += cached
        if not cached:
            prefixes.shrink(capacity - 1)
        prefixes.store(number, BLOCK + QUESTION)
        prefixes.release(number)
    return hits


def library_hits(cache, trace):
    hits = 0
    for document in trace:
        if document in cache:
            hits += 1
            cache[document]
        else:
            cache[document] = True
    return hits


@pytest.mark.parametrize("capacity", [1, 3, 10, 50])
@pytest.mark.parametrize("skew", [1.2, 2.0])
def test_lru_hits_as_often_as_that_of_a_library(capacity, skew):
    trace = (np.random.default_rng(3).zipf(skew, 3000) % 200).tolist()
    assert flat_hits("lru", trace, capacity) == library_hits(cachetools.LRUCache(capacity), trace)


@pytest.mark.parametrize("capacity", [1, 3, 10, 50])
@pytest.mark.parametrize("skew", [1.2, 2.0])
def test_lfu_hits_as_often_as_that_of_a_library(capacity, skew):
    trace = (np.random.default_rng(4).zipf(skew, 3000) % 200).tolist()
    assert flat_hits("lfu", trace, capacity) == library_hits(cachetools.LFUCache(capacity), trace)


def test_each_tier_has_a_clock_of_its_own():
    for name in ("gdsf", "pgdsf"):
        rule = BoundEviction(policies("cache_eviction")[name]())
        node = NodeView(last_use=9, uses=1, frequency=4, average_cost_s=0.5)
        worth = {"gdsf": 4.0, "pgdsf": 2.0}[name]
        assert rule.priority(Tier.gpu, node) == rule.priority(Tier.host, node) == worth
        rule.evicted(Tier.gpu, 3.0)
        rule.evicted(Tier.gpu, 1.0)
        assert rule.priority(Tier.gpu, node) == 3.0 + worth
        assert rule.priority(Tier.host, node) == worth


def test_the_profile_interpolates_as_scipy_does():
    cached, new = [0, 100, 300], [0, 16, 64, 256]
    seconds = [[cost_s(a, b) for b in new] for a in cached]
    profile = PrefillProfile(cached, new, seconds)
    wanted = RegularGridInterpolator((cached, new), seconds)
    for point in np.random.default_rng(0).uniform((0, 0), (300, 256), (200, 2)).round():
        assert profile.seconds(int(point[0]), int(point[1])) == pytest.approx(
            float(wanted(point)[0])
        )
    with pytest.raises(ValueError, match="increase"):
        PrefillProfile([0], [0, 1], [[0.0, 1.0]])
    with pytest.raises(ValueError, match="shape"):
        PrefillProfile([0, 1], [0, 1], [[0.0, 1.0]])
