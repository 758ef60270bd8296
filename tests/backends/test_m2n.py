"""Messages from M ranks to N: what arrives is what was sent, in order, and all of it is counted."""

import pytest
import torch
from message_work import (
    LATER,
    Case,
    in_three_ways,
    message_of,
    one_way,
    over_a_link,
    there_and_back,
    too_many_for_the_capacity,
)

from backends.emulated_link import EmulatedLink
from backends.m2n import Format
from backends.ranks import run_ranks

RANKS, SENDERS = 4, 2
ANSWERERS = range(SENDERS, RANKS)


def messages_of(case, source, target):
    """Rows and counts of all messages of a pair, in the order in which they are sent."""
    return [message_of(case, source, target, turn) for turn in case.turns()]


@pytest.fixture(
    scope="module",
    params=[
        Format(hidden=16, dtype=torch.float32, num_counts=4, max_rows=40),
        Format(hidden=7, dtype=torch.bfloat16, num_counts=1, max_rows=600),
        Format(hidden=1, dtype=torch.float64, num_counts=5, max_rows=3),
    ],
    ids=["float32", "bfloat16", "float64"],
)
def exchanged(request):
    case = Case(request.param, SENDERS, rounds=40, micro_batches=3, seed=11)
    return case, run_ranks(there_and_back, RANKS, (case,))


def test_what_arrives_is_what_was_sent_in_order_over_many_rounds(exchanged):
    case, ranks = exchanged
    for target in ANSWERERS:
        for source in range(SENDERS):
            came = [one for one in ranks[target]["came"] if one[0] == source]
            sent = messages_of(case, source, target)
            assert len(came) == len(sent) + 1
            for (_, rows, counts, stops), (sent_rows, sent_counts) in zip(came, sent, strict=False):
                assert not stops
                assert torch.equal(rows, sent_rows)
                assert counts == sent_counts
                assert sum(counts) == len(rows)
            assert {len(rows) for rows, _ in sent} >= {0, case.layout.max_rows}


def test_answers_come_back_in_order_and_only_to_whoever_sent_rows(exchanged):
    case, ranks = exchanged
    for source in range(SENDERS):
        for target in ANSWERERS:
            came = [one for one in ranks[source]["came"] if one[0] == target]
            asked = [message for message in messages_of(case, source, target) if len(message[0])]
            assert len(came) == len(asked)
            for (_, rows, counts, stops), (sent_rows, sent_counts) in zip(came, asked, strict=True):
                assert torch.equal(rows, 2 * sent_rows)
                assert (counts, stops) == (sent_counts, False)


def test_a_stop_is_heard_once_from_every_sender_after_everything_else(exchanged):
    _, ranks = exchanged
    for target in ANSWERERS:
        came = ranks[target]["came"]
        assert [one[0] for one in came[-SENDERS:]] == list(range(SENDERS))
        for _, rows, counts, stops in came[-SENDERS:]:
            assert stops
            assert len(rows) == sum(counts) == 0


def test_a_stop_leaves_no_buffer_behind_that_would_take_a_later_message(exchanged):
    case, ranks = exchanged
    for target in ANSWERERS:
        sent = [message_of(case, source, target, LATER)[0] for source in range(SENDERS)]
        assert list(map(torch.equal, ranks[target]["later"], sent)) == [True] * SENDERS


def test_payload_is_counted_by_pair_without_headers_and_empty_messages(exchanged):
    case, ranks = exchanged
    element_bytes = case.layout.dtype.itemsize
    for source in range(SENDERS):
        for target in ANSWERERS:
            rows = [rows for rows, _ in messages_of(case, source, target) if len(rows)]
            payload = sum(one.numel() for one in rows) * element_bytes
            there = ("there", "send_receive", source, target, len(rows), payload)
            back = ("back", "send_receive", target, source, len(rows), payload)
            assert [one for one in ranks[source]["sent"] if one.peer == target] == [there]
            assert [one for one in ranks[target]["sent"] if one.peer == source] == [back]
    for found in ranks:
        assert len(found["sent"]) == 2


@pytest.mark.parametrize("depth", [1, 3])
def test_a_sender_that_runs_ahead_overwrites_nothing_that_is_under_way(depth):
    layout = Format(hidden=64, dtype=torch.float32, num_counts=2, max_rows=200)
    case = Case(layout, 1, rounds=64, micro_batches=1, seed=depth)
    came = run_ranks(one_way, 2, (case, depth))[1]
    for rows, (sent, _) in zip(came, messages_of(case, 0, 1), strict=True):
        assert torch.equal(rows, sent)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def three_ways(request):
    layout = Format(hidden=8, dtype=request.param, num_counts=2, max_rows=301)
    case = Case(layout, SENDERS, rounds=12, micro_batches=1, seed=5)
    return case, run_ranks(in_three_ways, RANKS, (case,))


def test_both_kinds_of_all_to_all_bring_the_same_rows(three_ways):
    case, ranks = three_ways
    for target in ANSWERERS:
        found = ranks[target]
        sent = [
            torch.cat([message_of(case, source, target, turn)[0] for source in range(SENDERS)])
            for turn in case.turns()
        ]
        for way in ("messages", "uneven", "padded"):
            assert all(map(torch.equal, found[way], sent)), way
            assert len(found[way]) == len(sent)
    for source in range(SENDERS):
        assert not any(len(rows) for way in ("uneven", "padded") for rows in ranks[source][way])


def counted(ranks, name):
    """Calls and payload bytes of all ranks under one name."""
    rows = [one for found in ranks for one in found["sent"] if one.name == name]
    return sum(one.calls for one in rows), sum(one.payload_bytes for one in rows)


def test_messages_are_fewer_and_only_padding_makes_them_larger(three_ways):
    case, ranks = three_ways
    pairs = [(source, target) for source in range(SENDERS) for target in ANSWERERS]
    sizes = [len(rows) for pair in pairs for rows, _ in messages_of(case, *pair)]
    payload = sum(sizes) * case.layout.row_bytes
    exchanges = RANKS * case.rounds
    assert counted(ranks, "messages") == (sum(size > 0 for size in sizes), payload)
    # An all-to-all needs all ranks, and without padding a second one that says how much comes.
    assert counted(ranks, "uneven") == (exchanges, payload)
    assert counted(ranks, "uneven_sizes") == (exchanges, exchanges * RANKS * 8)
    blocks = RANKS * (case.layout.max_rows + 1) * case.layout.row_bytes
    assert counted(ranks, "padded") == (exchanges, exchanges * blocks)
    assert len(pairs) * case.rounds < 2 * exchanges
    assert payload < exchanges * blocks


def test_more_rows_than_the_capacity_are_refused():
    for message in run_ranks(too_many_for_the_capacity, 2):
        assert "send_rows=[3, 4] must each be at most capacity=3; raise it" in message


def test_a_slow_link_holds_messages_back_and_they_queue_for_it():
    latency_s, leaves_s = 0.15, 0.05
    layout = Format(hidden=250, dtype=torch.float32, num_counts=1, max_rows=50)
    case = Case(layout, 1, rounds=4, micro_batches=1, seed=0)
    bandwidth = layout.max_rows * layout.row_bytes / leaves_s
    link = EmulatedLink(latency_s=latency_s, bandwidth_bytes_per_s=bandwidth)
    (before_s,), arrived_s = run_ranks(over_a_link, 2, (case, link))
    assert len(arrived_s) == case.rounds
    for place, instant_s in enumerate(arrived_s):
        # The first leaves at once, each other one when those before it have left.
        assert instant_s - before_s >= (place + 1) * leaves_s + latency_s
