"""What ranks of elastic instances are made of: slots, stripes, parts of attention."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from backends.checkpoints import runnable_architecture
from backends.corruption import Corruption
from backends.elastic_orders import DropOrder, EndOrder, PrefillOrder
from backends.elastic_rank import OrderInbox
from backends.processes import process_context
from backends.ring_attention import Stripes, kept_positions
from backends.sequence_attention import (
    merge_parts,
    new_state,
    part_decode_attention,
    striped_prefill_attention,
)
from backends.slot_pool import SlotPool
from backends.weights import TINY_CONFIG

CONFIG = runnable_architecture(TINY_CONFIG, "config")
HEADS, KV_HEADS, DIM = 6, 3, 5
SCALE = DIM**-0.5


def heads_of(seed, tokens):
    """Query, key and value of so many tokens, float32."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn((tokens, heads, DIM), generator=generator)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )


def causal(query, key, value):
    """Of all tokens of one request at once, by torch."""
    parts = (part.transpose(0, 1)[None] for part in (query, key, value))
    return scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


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


@given(lengths_of, st.integers(1, 4), st.integers(0, 99))
def test_a_ring_of_any_size_gives_causal_attention(lengths, size, seed):
    whole = [heads_of(seed + at, length) for at, length in enumerate(lengths)]
    stripes = [Stripes.of(place, size, lengths) for place in range(size)]

    def rows(part, one):
        return torch.cat(
            [
                whole[at][part][one.positions[one.starts[at] : one.starts[at + 1]]]
                for at in range(len(lengths))
            ]
        )

    for mine in stripes:
        state = new_state(len(mine.positions), HEADS, DIM, "cpu")
        for other in stripes:
            positions = (torch.from_numpy(one.positions).int() for one in (mine, other))
            starts = (torch.from_numpy(one.starts).int() for one in (mine, other))
            striped_prefill_attention(
                rows(0, mine), rows(1, other), rows(2, other), *positions, *starts, SCALE, state
            )
        for at, parts in enumerate(whole):
            span = slice(mine.starts[at], mine.starts[at + 1])
            expected = causal(*parts)[mine.positions[span]]
            torch.testing.assert_close(state[0][span], expected, atol=1e-5, rtol=1e-5)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 3), st.data())
def test_parts_of_a_context_merge_to_attention_over_all_of_it(contexts, num_parts, data):
    total = sum(contexts)
    query = heads_of(1, len(contexts))[0]
    _, key, value = heads_of(2, total)
    starts = np.cumsum([0, *contexts])
    home = data.draw(st.lists(st.integers(0, num_parts - 1), min_size=total, max_size=total))
    found = []
    for part in range(num_parts):
        slots = [
            [token for token in range(begin, end) if home[token] == part]
            for begin, end in pairwise(starts)
        ]
        flat = torch.tensor([one for row in slots for one in row], dtype=torch.int64)
        ends = torch.tensor(np.cumsum([0, *map(len, slots)]), dtype=torch.int32)
        output, lse = part_decode_attention(query, key, value, flat, ends, SCALE)
        empty = [not row for row in slots]
        assert (output[empty] == 0).all()
        assert (lse[empty] == -math.inf).all()
        found.append((output, lse))
    merged = merge_parts(*map(torch.stack, zip(*found, strict=True)), torch.float32)
    for row, (begin, end) in enumerate(pairwise(starts)):
        parts = (query[row][None], key[begin:end], value[begin:end])
        heads = [part.transpose(0, 1)[None] for part in parts]
        expected = scaled_dot_product_attention(*heads, enable_gqa=True)[0, :, 0]
        torch.testing.assert_close(merged[row], expected, atol=1e-5, rtol=1e-5)


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
