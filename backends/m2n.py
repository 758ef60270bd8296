"""M to N: rows from every attention rank to the expert ranks that need them, and back.

The idea of MegaScale-Infer's library (arXiv 2504.02263, section 5) with what torch has: buffers are
registered once, a message carries its sizes with its rows, pairs of ranks need no group and nobody
waits for ranks that it does not talk to. Gloo delivers a message that is shorter than the buffer it
was posted with, so that header and rows are one message; NCCL wants equal sizes, and gets the
header over gloo first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from backends.collectives import Collectives
from backends.emulated_link import EmulatedLink

STOP = -1
"""Instead of a number of rows: nothing more will come."""
WORD = 8
"""Bytes of each of the header's numbers: rows, the instant at which they are due, and counts."""


class Format(NamedTuple):
    """What messages look like, on all ranks alike."""

    hidden: int
    """Elements of a row."""
    dtype: torch.dtype
    num_counts: int
    """Experts of a rank: a message says how many rows are for each."""
    max_rows: int
    """Of one message."""

    @property
    def header_bytes(self) -> int:
        """Of rows, instant and counts."""
        return WORD * (2 + self.num_counts)

    @property
    def row_bytes(self) -> int:
        """Of one row."""
        return self.hidden * self.dtype.itemsize

    @property
    def max_bytes(self) -> int:
        """Of the largest message."""
        return self.header_bytes + self.max_rows * self.row_bytes


class Delivery(NamedTuple):
    """What came in one message."""

    rows: Tensor
    """[n, hidden], valid until the buffer is posted again."""
    counts: list[int]
    """Rows of each expert; they add up to n."""
    stops: bool


DISPATCH, COMBINE = 0, 1
"""The two directions. Each has a group of its own, see `Collectives`."""


class Channel:
    """One direction between this rank and another, with a buffer for every message under way."""

    def __init__(
        self, world: Collectives, peer: int, layout: Format, depth: int, way: int,
        link: EmulatedLink | None = None,
    ) -> None:  # fmt: skip
        """Register the buffers.

        Args:
            world: all ranks of the run; counts what is sent.
            peer: the other rank.
            layout: of the messages.
            depth: messages that may be under way at once.
            way: `DISPATCH` or `COMBINE`.
            link: delays what is sent; None: nothing does.
        """
        self._world, self._peer, self._layout = world, peer, layout
        self._device, self._group, self._link = world.device, world.ways[way], link
        self._in_one = self._device.type == "cpu"
        size = layout.max_bytes if self._in_one else layout.header_bytes
        self._buffers = [torch.empty(size, dtype=torch.uint8) for _ in range(depth)]
        shape = (0 if self._in_one else layout.max_rows, layout.hidden)
        self._rows = [
            torch.empty(shape, dtype=layout.dtype, device=self._device) for _ in range(depth)
        ]
        self._pending: list[Any] = [None] * depth
        self._rows_pending: list[Any] = [None] * depth
        self._posted: deque[int] = deque()
        self._turn = 0

    def send(self, rows: Tensor, counts: Sequence[int], name: str) -> None:
        """Send rows and go on; they are copied first. Payload: the rows, counted for this pair.

        Args:
            rows: [n, hidden], sorted by expert.
            counts: of each expert.
            name: see `Sent`.
        """
        assert len(rows) <= self._layout.max_rows, "the format's max_rows covers every batch"
        due_s = 0.0
        if len(rows):
            self._world.tally.add(name, "send_receive", rows, self._peer)
            if self._link is not None:
                due_s = float(self._link.stamp(rows, self._peer))
        self._put(rows, len(rows), due_s, counts)

    def stop(self) -> None:
        """Say that nothing more will come, as often as the other rank has buffers posted for it."""
        empty = torch.empty((0, self._layout.hidden), dtype=self._layout.dtype)
        for _ in self._buffers:
            self._put(empty, STOP, 0.0, [0] * self._layout.num_counts)

    def post(self) -> None:
        """Make a buffer ready for the next message that comes."""
        at = self._turn
        self._turn = (at + 1) % len(self._buffers)
        self._pending[at] = dist.irecv(self._buffers[at], src=self._peer, group=self._group)
        self._posted.append(at)

    def receive(self) -> Delivery:
        """Wait for the oldest message that a buffer was posted for."""
        at = self._posted.popleft()
        self._pending[at].wait()
        self._pending[at] = None  # gloo would wait for another message the second time
        num_rows, due_s, counts = self._read(self._buffers[at])
        count, layout = max(num_rows, 0), self._layout
        if self._in_one:
            start = layout.header_bytes
            content = self._buffers[at][start : start + count * layout.row_bytes]
            rows = content.view(layout.dtype).view(count, layout.hidden)
        else:
            rows = self._rows[at][:count]
            if count:
                dist.recv(rows, src=self._peer, group=self._group)
        EmulatedLink.deliver(rows, due_s)
        return Delivery(rows, counts, num_rows == STOP)

    def drain(self) -> None:
        """Wait for whatever buffers are posted for, so that none is left for a later message."""
        while self._posted:
            self.receive()

    def flush(self) -> None:
        """Wait until all that was sent has been received."""
        for work in self._pending:
            if work is not None:
                work.wait()
        self._pending = [None] * len(self._buffers)

    def _put(self, rows: Tensor, num_rows: int, due_s: float, counts: Sequence[int]) -> None:
        at = self._turn
        self._turn = (at + 1) % len(self._buffers)
        for work in (self._pending[at], self._rows_pending[at]):
            if work is not None:
                work.wait()  # what was sent from these buffers is still read
        buffer, layout = self._buffers[at], self._layout
        header = buffer[: layout.header_bytes].view(torch.int64)
        header[0] = num_rows
        header[2:] = torch.tensor(counts, dtype=torch.int64)
        buffer[WORD : 2 * WORD].view(torch.float64)[0] = due_s
        end = layout.header_bytes
        if self._in_one and len(rows):
            end += len(rows) * layout.row_bytes
            content = buffer[layout.header_bytes : end].view(layout.dtype)
            content.view(len(rows), layout.hidden).copy_(rows)
        self._pending[at] = dist.isend(buffer[:end], dst=self._peer, group=self._group)
        if not self._in_one and len(rows):
            kept = self._rows[at][: len(rows)]
            kept.copy_(rows)
            self._rows_pending[at] = dist.isend(kept, dst=self._peer, group=self._group)

    def _read(self, buffer: Tensor) -> tuple[int, float, list[int]]:
        words = buffer[: self._layout.header_bytes].view(torch.int64).tolist()
        due_s = float(buffer[WORD : 2 * WORD].view(torch.float64))
        return words[0], due_s, words[2:]


def all_to_all_rows(
    world: Collectives, rows: Tensor, send_rows: Sequence[int], name: str
) -> tuple[Tensor, list[int]]:
    """The same exchange as one all-to-all of sizes and one of rows, in which all ranks take part.

    Args:
        world: all ranks, those included that have nothing to send or to get.
        rows: [n, hidden], those for rank 0 first.
        send_rows: how many go to each rank.
        name: see `Sent`.

    Returns:
        The rows that came, those of rank 0 first, and how many came from each rank.
    """
    sizes = torch.tensor(send_rows, dtype=torch.int64)
    received = world.all_to_all(sizes, f"{name}_sizes").tolist()
    return world.all_to_all(rows, name, list(send_rows), received), received


def padded_all_to_all_rows(
    world: Collectives, rows: Tensor, send_rows: Sequence[int], capacity: int, name: str
) -> tuple[Tensor, list[int]]:
    """The same exchange with as many rows to every rank: no sizes are exchanged, padding is.

    Args:
        world: as `all_to_all_rows`.
        rows: as there.
        send_rows: as there; none above `capacity`.
        capacity: rows of every message.
        name: see `Sent`.

    Returns:
        As `all_to_all_rows`.

    Raises:
        ValueError: more rows for a rank than fit.
    """
    if max(send_rows) > capacity:
        raise ValueError(
            f"send_rows={list(send_rows)} must each be at most capacity={capacity}; raise it, or "
            "drop tokens"
        )
    width = rows.shape[1]
    head = -(-WORD // (width * rows.element_size()))
    padded = rows.new_zeros((world.size, head + capacity, width))
    for place, part in enumerate(rows.split(list(send_rows))):
        padded[place, head : head + len(part)] = part
    # As bytes: a number of rows need not be a number that the dtype has.
    sizes = torch.tensor(send_rows, dtype=torch.int64, device=rows.device).view(-1, 1)
    padded.view(world.size, -1).view(torch.uint8)[:, :WORD] = sizes.view(torch.uint8)
    mixed = world.all_to_all(padded.view(-1, width), name).view(padded.shape)
    words = mixed.view(world.size, -1).view(torch.uint8)[:, :WORD].contiguous()
    counts: list[int] = words.view(torch.int64)[:, 0].tolist()
    return torch.cat([mixed[at, head : head + n] for at, n in enumerate(counts)]), counts
