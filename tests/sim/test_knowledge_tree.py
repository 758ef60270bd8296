"""The knowledge tree against one that searches through all its nodes: the same moves, always."""

from collections import Counter
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_knowledge import PlainTree

from sim.policies.cache_eviction.base import BoundEviction
from sim.policies.registry import policies
from sim.requests import RequestView
from sim.state.knowledge_prefixes import KnowledgePrefixes
from sim.state.knowledge_tree import KnowledgeTree, MoveKind

RULES = ["gdsf", "lfu", "lru", "pgdsf"]
BLOCK = 4
QUESTION = 3


def _cost_s(cached, new):
    return 1e-3 + 1e-5 * new + 1e-7 * new * (cached + new / 2)


def _make_prefixes(rule, lengths, *, system=0, host_blocks=0, replicate_from=None):
    bound = BoundEviction(policies("cache_eviction")[rule]())
    tree = KnowledgeTree(bound, host_blocks, replicate_from)
    return KnowledgePrefixes(tree, BLOCK, lengths, system, _cost_s)


def _make_view(number, documents, lengths, system=0):
    prompt = system + sum(lengths[one] for one in documents) + QUESTION
    return RequestView(number, float(number), prompt, 9)


def _serve(prefixes, number, documents, lengths, system=0):
    """One request from its start to its end."""
    view = _make_view(number, documents, lengths, system)
    prefixes.register(number, documents)
    prefixes.hold(view)
    prefixes.store(number, view.prompt_tokens)
    prefixes.release(number)
    prefixes.forget(number)


def _by_step(moves):
    """Moves in order; documents that are lost together are, in any order."""
    runs = [(kind, list(some)) for kind, some in groupby(moves, key=lambda one: one[0])]
    lost = (MoveKind.forget, MoveKind.drop)
    return [sorted(some) if kind in lost else some for kind, some in runs]


class _Beside:
    """The tree and its plain form, told the same things and asked to say the same."""

    def __init__(self, draw):
        self.lengths = draw(st.lists(st.integers(1, 13), min_size=3, max_size=5))
        self.system = draw(st.sampled_from([0, 0, 3, 9]))
        sizes = {
            "host_blocks": draw(st.sampled_from([0, 1, 3, 5, 8, 99])),
            "replicate_from": draw(st.sampled_from([None, 1, 2, 3])),
        }
        rule = draw(st.sampled_from(RULES))
        self.fast = _make_prefixes(rule, self.lengths, system=self.system, **sizes)
        self.plain = PlainTree(
            rule, BLOCK, self.lengths, system=self.system, cost_s=_cost_s, **sizes
        )  # fmt: skip
        self.waiting, self.running, self.count = {}, {}, 0
        self.on_host = set()

    def step(self, draw):
        what = draw(st.sampled_from(
            ["arrive", "arrive", "admit", "admit", "compute", "leave", "leave", "pre-empt",
             "shrink", "shrink", "lose"]
        ))  # fmt: skip
        before = {node.number: (node.pins, node.gpu_children) for node in self.fast.tree.nodes()}
        getattr(self, "_" + what.replace("-", "_"))(draw)
        self._agree(exact=what != "lose", before=before)

    def _arrive(self, draw):
        some = st.integers(0, len(self.lengths) - 1)
        documents = tuple(draw(st.lists(some, min_size=1, max_size=3, unique=True)))
        self.fast.register(self.count, documents)
        self.waiting[self.count] = documents
        self.count += 1

    def _admit(self, draw):
        if not self.waiting:
            return
        number = draw(st.sampled_from(sorted(self.waiting)))
        documents = self.running[number] = self.waiting.pop(number)
        view = _make_view(number, documents, self.lengths, self.system)
        found = self.plain.cached(documents)
        free = sum(node.blocks for node in found if not self.plain.pins(node))
        assert self.fast.hold(view) == (BLOCK * sum(node.blocks for node in found), free)
        self.plain.hold(number, documents, view.prefill_tokens)
        if draw(st.booleans()):
            self._store(number, view.prompt_tokens)

    def _compute(self, draw):
        if self.running:
            self._store(draw(st.sampled_from(sorted(self.running))), draw(st.integers(0, 40)))

    def _store(self, number, tokens):
        documents = self.running[number]
        tokens = min(tokens, _make_view(0, documents, self.lengths, self.system).prompt_tokens)
        wanted = self.plain.store(number, documents, tokens)
        assert self.fast.store(number, tokens) == wanted

    def _pre_empt(self, draw):
        if self.running:
            number = draw(st.sampled_from(sorted(self.running)))
            assert self.fast.release(number) == self.plain.release(number)
            self.waiting[number] = self.running.pop(number)

    def _leave(self, draw):
        if self.running:
            self._pre_empt(draw)
            self.fast.forget(list(self.waiting)[-1])
            self.waiting.popitem()

    def _shrink(self, draw):
        room, before = draw(st.integers(0, 9)), self.plain.unheld
        self.plain.shrink(room)
        assert self.fast.shrink(room) == before - self.plain.unheld
        assert self.fast.unheld <= room

    def _lose(self, draw):
        del draw
        while self.running:
            number, documents = self.running.popitem()
            self.waiting[number] = documents
            assert self.fast.release(number) == self.plain.release(number)
        self.fast.lose_gpu()
        self.plain.lose_gpu()
        assert self.fast.tree.gpu_used == 0

    def _agree(self, *, exact, before):
        moves = [tuple(move) for move in self.fast.tree.take_moves()]
        wanted, self.plain.moves = self.plain.moves, []
        assert _by_step(moves) == _by_step(wanted)
        self._check_moves(moves, exact=exact, before=before)
        self._check_sums()
        for number, documents in self.waiting.items():
            found = self.plain.cached(documents)
            free = sum(node.blocks for node in found if not self.plain.pins(node))
            seen = self.fast.cached(_make_view(number, documents, self.lengths, self.system))
            assert seen == (BLOCK * sum(node.blocks for node in found), free)
        self._check_shared()

    def _check_moves(self, moves, *, exact, before):
        for kind, number, _, _ in moves:
            if kind in (MoveKind.swap_out, MoveKind.replicate):
                assert number not in self.on_host, "copied to the host twice"
                self.on_host.add(number)
            elif kind is MoveKind.forget:
                self.on_host.remove(number)
            if exact and kind in (MoveKind.swap_out, MoveKind.drop):
                pins, children = before[number]
                left = [
                    one for other, one, _, _ in moves if other in (MoveKind.swap_out, MoveKind.drop)
                ]
                gone = left[: left.index(number)]
                parents = Counter(
                    node.parent.number for node in self.fast.tree.nodes() if node.number in gone
                )
                assert not pins, "a document in use left"
                assert parents[number] == children, "a parent left before its child"

    def _check_sums(self):
        tree, nodes = self.fast.tree, list(self.fast.tree.nodes())
        held = Counter(one for number in self.running for one in self.fast.held_nodes(number))
        for node in nodes:
            assert node.pins == held[node]
            assert not node.pins or node.gpu
            assert node.parent.gpu or not node.gpu, "a parent is in a slower tier"
            assert node.parent.cached or not node.host, "a parent is in no tier"
        assert tree.unheld == sum(one.blocks for one in nodes if one.gpu and not one.pins)
        assert tree.gpu_used == sum(one.blocks for one in nodes if one.gpu)
        assert tree.host_used == sum(one.blocks for one in nodes if one.host)
        assert tree.host_used <= tree.host_blocks

    def _check_shared(self):
        for some in (sorted(self.running), sorted(self.running)[:1], sorted(self.running)[1:]):
            held = Counter(one for number in some for one in self.fast.held_nodes(number))
            given_up = sum(one.blocks for one, count in held.items() if one.pins == count)
            whole = sum(self.fast.held_blocks(number) for number in some)
            assert whole - self.fast.shared_blocks(tuple(some)) == given_up


@settings(max_examples=250, deadline=None)
@given(data=st.data(), count=st.integers(5, 40))
def test_the_tree_moves_as_one_that_searches_all_its_nodes(data, count):
    both = _Beside(data.draw)
    for _ in range(count):
        both.step(data.draw)
    for number in list(both.running):
        both.fast.release(number)
    nodes = list(both.fast.tree.nodes())
    assert not any(node.pins for node in nodes)
    both.fast.shrink(0)
    assert both.fast.tree.gpu_used == both.fast.unheld == 0


@pytest.mark.parametrize("rule", RULES)
def test_a_replica_of_one_document_does_not_evict_the_next_of_the_same_request(rule):
    lengths = [BLOCK, BLOCK]
    prefixes = _make_prefixes(rule, lengths, host_blocks=1, replicate_from=3)
    _serve(prefixes, 0, (0, 1), lengths)
    prefixes.shrink(1)
    _serve(prefixes, 1, (0,), lengths)
    prefixes.tree.take_moves()
    _serve(prefixes, 2, (0, 1), lengths)
    assert [move.kind for move in prefixes.tree.take_moves()] == [MoveKind.load]


def test_a_loss_of_the_gpu_that_is_refused_changes_nothing():
    lengths = [BLOCK] * 3
    prefixes = _make_prefixes("lru", lengths, host_blocks=9)
    _serve(prefixes, 0, (0,), lengths)
    prefixes.register(1, (1,))
    prefixes.hold(_make_view(1, (1,), lengths))
    prefixes.store(1, BLOCK)
    prefixes.tree.take_moves()
    with pytest.raises(ValueError, match="node 2 is held; pre-empt its 1 requests"):
        prefixes.lose_gpu()
    assert (prefixes.tree.gpu_used, prefixes.unheld, prefixes.tree.moves) == (2, 1, [])


@pytest.mark.parametrize("system", [0, 2 * BLOCK])
def test_a_hot_document_behind_the_system_prompt_outlives_the_gpu(system):
    lengths = [BLOCK, BLOCK]
    prefixes = _make_prefixes("lru", lengths, system=system, host_blocks=9, replicate_from=2)
    for number in range(3):
        _serve(prefixes, number, (0, 1), lengths, system)
    prefixes.lose_gpu()
    prefixes.register(9, (0, 1))
    found = prefixes.cached(_make_view(9, (0, 1), lengths, system))
    assert found.tokens == system + BLOCK


@pytest.mark.parametrize("rule", RULES)
def test_a_request_that_is_admitted_takes_nothing_from_what_another_was_promised(rule):
    """Both are admitted by one decision, which counted on what was cached before it."""
    lengths = [BLOCK, BLOCK]
    prefixes = _make_prefixes(rule, lengths, host_blocks=1, replicate_from=3)
    _serve(prefixes, 0, (1,), lengths)
    prefixes.shrink(0)
    for number in (1, 2):
        _serve(prefixes, number, (0,), lengths)
    one, other = _make_view(3, (0,), lengths), _make_view(4, (1,), lengths)
    prefixes.register(3, (0,))
    prefixes.register(4, (1,))
    promised = prefixes.cached(other)
    assert promised.tokens == BLOCK
    prefixes.hold(one)
    assert prefixes.hold(other) == promised
