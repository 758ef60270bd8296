"""What ranks of elastic instances are made of: slots, stripes, parts of attention."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backends.checkpoints import runnable_architecture
from backends.corruption import Corruption
from backends.elastic_orders import DropOrder, EndOrder, PrefillOrder
from backends.elastic_rank import OrderInbox
from backends.processes import process_context
from backends.ring_attention import Stripes, kept_positions
from backends.slot_pool import SlotPool
from backends.weights import TINY_CONFIG

CONFIG = runnable_architecture(TINY_CONFIG, "config")
lengths_of = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@given(lengths_of, st.integers(1, 5))
def test_stripes_hold_every_token_once_and_differ_by_one_at_most(lengths, size):
    stripes = [Stripes.of(place, size, lengths) for place in range(size)]
    for at, length in enumerate(lengths):
        parts = [one.positions[one.starts[at] : one.starts[at + 1]] for one in stripes]
        assert sorted(np.concatenate(parts).tolist()) == list(range(length))
        assert all((part % size == place).all() for place, part in enumerate(parts))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(lengths_of, st.data())
def test_what_is_kept_is_every_token_once_in_the_order_of_the_targets(lengths, data):
    placed = []
    for length in lengths:
        cuts = sorted(data.draw(st.lists(st.integers(0, length), min_size=2, max_size=2)))
        ends = [0, *cuts, length]
        homes = data.draw(st.permutations(range(3)))
        placed.append(tuple((homes[at], ends[at + 1] - ends[at]) for at in range(3)))
    order = PrefillOrder(0, (), (), (), tuple(placed))
    kept = [kept_positions(order, instance) for instance in range(3)]
    for at, length in enumerate(lengths):
        mine = {instance: kept[instance][at].tolist() for instance in range(3)}
        assert [position for home, _ in placed[at] for position in mine[home]] == list(
            range(length)
        )


@given(st.lists(st.tuples(st.sampled_from("afg"), st.integers(0, 3), st.integers(1, 7))))
def test_a_pool_agrees_with_lists_of_what_each_request_stored(steps):
    """Allocate, free, and give up the first tokens, in any order."""
    pool, model, position = SlotPool(CONFIG, 24), {}, 0
    freed = written = 0
    for what, request, tokens in steps:
        held = model.setdefault(request, [])
        if what == "a" and tokens <= 24 - sum(map(len, model.values())):
            places = np.arange(position, position + tokens)
            (slots,) = pool.allocate([(request, places)])
            assert pool.begin_write(torch.from_numpy(slots)) is None
            held += places.tolist()
            position, written = position + tokens, written + tokens
        elif what == "f":
            pool.free(request)
            freed += len(held)
            held.clear()
        elif what == "g" and len(held) >= tokens:
            slots, places = pool.first(request, tokens)
            assert places.tolist() == held[:tokens]
            assert (pool.owner[slots] == request).all()
            pool.give_up(request, tokens)
            freed += tokens
            del held[:tokens]
        pool.check()
        assert pool.positions(request).tolist() == held
        assert pool.free_slots == 24 - sum(map(len, model.values()))
        assert pool.holds(request) == bool(held)
    counts = pool.counts()
    assert counts.written_bytes == written * pool.token_bytes
    assert counts.freed_bytes == freed * pool.token_bytes


def test_a_pool_refuses_more_tokens_than_it_has_slots_and_takes_none():
    pool = SlotPool(CONFIG, 5)
    pool.allocate([(0, np.arange(3))])
    with pytest.raises(ValueError, match=r"3 tokens of requests \[1\] .* free_slots=2 of 5"):
        pool.allocate([(1, np.arange(3))])
    assert pool.free_slots == 2
    with pytest.raises(ValueError, match="4 tokens of request 0 are to move and 3 are here"):
        pool.first(0, 4)
    with pytest.raises(ValueError, match="num_slots=0 must be at least 1"):
        SlotPool(CONFIG, 0)


def test_a_pool_that_is_corrupted_is_found_out():
    pool = SlotPool(CONFIG, 5)
    pool.corrupt = Corruption(kind="skip_free", index=1)
    for request in range(2):
        pool.allocate([(request, np.arange(2))])
        pool.free(request)
    with pytest.raises(AssertionError, match="2 slots are owned by no live request"):
        pool.check()
    other = SlotPool(CONFIG, 5)
    other.corrupt = Corruption(kind="drop_copy", index=2)
    (slots,) = other.allocate([(0, np.arange(4))])
    kept = other.begin_write(torch.from_numpy(slots))
    assert kept is not None
    assert kept.tolist() == [0, 1, 3]
    assert other.written_tokens == 3


def test_drops_are_taken_ahead_of_an_order_that_waits_but_not_out_of_their_own_order():
    near, far = process_context().Pipe()
    inbox = OrderInbox(far)
    drops = [DropOrder(0, (1,)), DropOrder(1, (2, 3)), DropOrder(2, (4,))]
    for order in (*drops, EndOrder()):
        near.send(("order", order))
    assert inbox.take_drops({3}) == drops[:1]
    assert inbox.take_drops({4}) == drops[1:2]
    assert inbox.next_order() == drops[2]
    assert inbox.take_drops(()) == []
    assert inbox.next_order() == EndOrder()
