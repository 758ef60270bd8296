"""Messages between ranks that may be lost: who waits for one that died goes on with NaN.

The message pattern of an iteration stays whole whoever dies in it, so that nobody waits for ever:
whoever cannot hear or reach another notes it and computes on. All that comes of it is not a number,
on other ranks too, and is thrown away. Over NCCL a rank that waits for a dead one does not come
back.
"""

from __future__ import annotations

import time
from math import nan
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from backends.collectives import Collectives


class Posted(NamedTuple):
    """A message that will come."""

    work: Any
    """None: its sender is lost."""
    tensor: Tensor
    source: int


class Wires:
    """Point to point between any two ranks of a group, counted by its `Tally`."""

    def __init__(self, world: Collectives) -> None:
        """Take over the ranks of a run, with a group for either direction, and try every pair.

        Args:
            world: made with `two_ways`; over NCCL two ranks that both send first would otherwise
                wait for each other.
        """
        self._world, self.tally = world, world.tally
        self.place, self.device = world.place, world.device
        self.lost: set[int] = set()
        """Ranks that could not be heard or reached since it was emptied."""
        self.wait_s = 0.0
        """Seconds that were spent waiting for messages."""
        self._pending: list[tuple[Any, Tensor, int]] = []
        for sender in range(world.size):
            for receiver in range(world.size):
                if sender != receiver and self.place in (sender, receiver):
                    self._try(sender, receiver)
        self.tally.clear()

    def send(self, tensor: Tensor, name: str, to: int) -> None:
        """Send and go on; the tensor must not change until `flush`. Payload: the tensor.

        A tensor without elements is not sent, and whoever posts one does not wait for it.
        """
        if not tensor.numel():
            return
        tensor = tensor.contiguous()
        self.tally.add(name, "send_receive", tensor, to)
        try:
            work = dist.isend(tensor, group=self._way(self.place, to), group_dst=to)
        except RuntimeError:
            self.lost.add(to)
        else:
            self._pending.append((work, tensor, to))

    def post(self, tensor: Tensor, source: int) -> Posted:
        """Let what a rank sends next go into a tensor; `receive` waits for it."""
        if not tensor.numel():
            return Posted(None, tensor, source)
        try:
            work = dist.irecv(tensor, group=self._way(source, self.place), group_src=source)
        except RuntimeError:
            work = None
        return Posted(work, tensor, source)

    def receive(self, posted: Posted) -> Tensor:
        """What came; NaN, or 0 where there is none, from a rank that is lost."""
        if not posted.tensor.numel():
            return posted.tensor
        begin_s = time.perf_counter()
        try:
            if posted.work is None:
                raise RuntimeError
            posted.work.wait()
        except RuntimeError:
            self.lost.add(posted.source)
            posted.tensor.fill_(nan if posted.tensor.is_floating_point() else 0)
        self.wait_s += time.perf_counter() - begin_s
        return posted.tensor

    def flush(self) -> None:
        """Wait until all that was sent has been received, or its receiver is lost."""
        begin_s = time.perf_counter()
        for work, _, to in self._pending:
            try:
                work.wait()
            except RuntimeError:
                self.lost.add(to)
        self._pending.clear()
        self.wait_s += time.perf_counter() - begin_s

    def _way(self, sender: int, receiver: int) -> Any:
        return self._world.ways[sender > receiver]

    def _try(self, sender: int, receiver: int) -> None:
        for device in {torch.device("cpu"), self.device}:
            one = torch.ones(1, device=device)
            if self.place == sender:
                self.send(one, "warm-up", receiver)
                self.flush()
            else:
                self.receive(self.post(one, sender))
