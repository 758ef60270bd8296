"""What ranks do in the tests of messages from M ranks to N; a spawned process imports it by name.

All rows are drawn from a seed, so that whoever judges an exchange can draw them again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from backends.collectives import Collectives, Tally
from backends.emulated_link import EmulatedLink
from backends.m2n import COMBINE, DISPATCH, Channel, Format, all_to_all_rows, padded_all_to_all_rows

LATER = (999, 9)
"""Turn of a message that follows when all others are over."""


class Case(NamedTuple):
    """An exchange of some rounds of micro-batches; the first ranks send, the others answer."""

    layout: Format
    senders: int
    rounds: int
    micro_batches: int
    seed: int

    def turns(self) -> Iterator[tuple[int, int]]:
        """Round and micro-batch of every exchange, in order."""
        for turn in range(self.rounds):
            for micro_batch in range(self.micro_batches):
                yield turn, micro_batch


def message_of(
    case: Case, source: int, target: int, turn: tuple[int, int]
) -> tuple[Tensor, list[int]]:
    """Rows [n, hidden] and counts of one message: every fourth is empty, every fourth is full."""
    key = ((case.seed * 10 + source) * 10 + target) * 10_000 + turn[0] * 10 + turn[1]
    stream, layout = torch.Generator().manual_seed(key), case.layout
    kind = int(torch.randint(4, (1,), generator=stream))
    most = layout.max_rows
    size = [0, most, *torch.randint(most + 1, (2,), generator=stream).tolist()][kind]
    chosen = torch.randint(layout.num_counts, (size,), generator=stream)
    rows = torch.randn(size, layout.hidden, generator=stream).to(layout.dtype)
    return rows, torch.bincount(chosen, minlength=layout.num_counts).tolist()


def there_and_back(rank: int, size: int, case: Case) -> dict[str, object]:
    """Every sender to every answerer and back, several micro-batches under way at once.

    When all that is over and the channels are drained, one more message goes through new ones.
    """
    tally = Tally(rank)
    world = Collectives(range(size), tally)
    peers = range(case.senders, size) if rank < case.senders else range(case.senders)
    depth = case.micro_batches
    out = {peer: Channel(world, peer, case.layout, depth, DISPATCH) for peer in peers}
    back = {peer: Channel(world, peer, case.layout, depth, COMBINE) for peer in peers}
    came = _ask(rank, case, out, back) if rank < case.senders else _answer(case, out, back)
    for channel in (*out.values(), *back.values()):
        channel.drain()
        channel.flush()
    sent = tally.sent()
    later: list[Tensor] = []
    for peer in peers:
        channel = Channel(world, peer, case.layout, 1, DISPATCH)
        if rank < case.senders:
            channel.send(*message_of(case, rank, peer, LATER), "later")
            channel.flush()
        else:
            channel.post()
            later.append(channel.receive().rows)
    return {"came": came, "sent": sent, "later": later}


def _ask(rank: int, case: Case, out: dict[int, Channel], back: dict[int, Channel]) -> list[object]:
    came: list[object] = []
    away: dict[int, list[int]] = {}
    for turn in case.turns():
        micro_batch = turn[1]
        for peer in away.pop(micro_batch, []):
            delivery = back[peer].receive()
            came.append((peer, delivery.rows.clone(), delivery.counts, delivery.stops))
        for peer, channel in out.items():
            rows, counts = message_of(case, rank, peer, turn)
            channel.send(rows, counts, "there")
            if len(rows):
                back[peer].post()
                away.setdefault(micro_batch, []).append(peer)
            rows.fill_(-1.0)  # what was handed in may change at once
    for micro_batch in range(case.micro_batches):
        for peer in away.pop(micro_batch, []):
            delivery = back[peer].receive()
            came.append((peer, delivery.rows.clone(), delivery.counts, delivery.stops))
    for channel in out.values():
        channel.stop()
    return came


def _answer(case: Case, out: dict[int, Channel], back: dict[int, Channel]) -> list[object]:
    """Doubles what comes until all senders stop."""
    for channel in back.values():
        for _ in range(case.micro_batches):
            channel.post()
    came: list[object] = []
    while True:
        for peer, channel in back.items():
            delivery = channel.receive()
            rows, counts = delivery.rows.clone(), delivery.counts
            came.append((peer, rows, counts, delivery.stops))
            if delivery.stops:
                continue
            channel.post()
            if len(rows):
                out[peer].send(2 * rows, counts, "back")
        if any(stops for *_, stops in came):
            return came


def one_way(rank: int, size: int, case: Case, depth: int) -> list[Tensor]:
    """Far more messages than buffers, to a rank that makes room for one at a time."""
    channel = Channel(Collectives(range(size), Tally(rank)), 1 - rank, case.layout, depth, DISPATCH)
    if rank == 0:
        for turn in case.turns():
            channel.send(*message_of(case, 0, 1, turn), "there")
        channel.flush()
        return []
    came: list[Tensor] = []
    for turn in case.turns():
        if turn[0] % 8 == 0:
            time.sleep(0.005)
        channel.post()
        came.append(channel.receive().rows.clone())
    return came


def in_three_ways(rank: int, size: int, case: Case) -> dict[str, object]:
    """The same rows by messages and by two kinds of all-to-all; what came and what was counted."""
    tally = Tally(rank)
    world = Collectives(range(size), tally)
    sends = rank < case.senders
    peers = range(case.senders, size) if sends else range(case.senders)
    channels = {peer: Channel(world, peer, case.layout, 1, DISPATCH) for peer in peers}
    found: dict[str, list[Tensor]] = {"messages": [], "uneven": [], "padded": []}
    for turn in case.turns():
        given = [
            message_of(case, rank, peer, turn) if sends and peer in peers else _nothing(case)
            for peer in range(size)
        ]
        for peer, channel in channels.items():
            if sends:
                channel.send(*given[peer], "messages")
            else:
                channel.post()
        if not sends:
            rows = [channel.receive().rows for channel in channels.values()]
            found["messages"].append(torch.cat(rows))
        whole, counts = torch.cat([rows for rows, _ in given]), [len(rows) for rows, _ in given]
        uneven, uneven_counts = all_to_all_rows(world, whole, counts, "uneven")
        padded, padded_counts = padded_all_to_all_rows(
            world, whole, counts, case.layout.max_rows, "padded"
        )
        assert uneven_counts == padded_counts
        found["uneven"].append(uneven)
        found["padded"].append(padded)
    for channel in channels.values():
        channel.flush()
    return {**found, "sent": tally.sent()}


def _nothing(case: Case) -> tuple[Tensor, list[int]]:
    return torch.empty((0, case.layout.hidden), dtype=case.layout.dtype), []


def too_many_for_the_capacity(rank: int, size: int) -> str:
    """What is said of more rows than a padded message holds."""
    world = Collectives(range(size), Tally(rank))
    try:
        padded_all_to_all_rows(world, torch.ones(7, 3), [3, 4], 3, "padded")
    except ValueError as error:
        return str(error)
    return ""


def over_a_link(rank: int, size: int, case: Case, link: EmulatedLink) -> list[float]:
    """Instants before sending at the first rank, and of each delivery at the other."""
    world = Collectives(range(size), Tally(rank))
    channel = Channel(world, 1 - rank, case.layout, case.rounds, DISPATCH, link)
    rows = torch.ones(case.layout.max_rows, case.layout.hidden)
    if rank == 0:
        before_s = time.monotonic()
        for _ in case.turns():
            channel.send(rows, [len(rows)], "there")
        channel.flush()
        return [before_s]
    arrived_s: list[float] = []
    for _ in case.turns():
        channel.post()
        channel.receive()
        arrived_s.append(time.monotonic())
    return arrived_s
