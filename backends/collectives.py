"""Everything that one rank sends to another goes through here, and is counted here.

`torch.distributed` moves it: gloo between tensors on CPUs, NCCL between CUDA devices. What is
counted is payload, `numel * element_size` of the tensor that a rank hands in; what an algorithm
makes of it on the wire is not payload.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from backends.emulated_link import EmulatedLink

MAX_PENDING = 64
"""Sends to each other rank whose tensors are kept; gloo tells of a send's end only who waits."""
BACKEND = "cpu:gloo,cuda:nccl"
"""A tensor's device decides: numbers of a decision stay on the CPU whatever the model runs on."""

# torch 2.13 renamed them; the old names warn there.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Sent(NamedTuple):
    """Payload that one rank handed in under one name."""

    name: str
    """What was carried, such as `attention_output`."""
    operation: str
    """all_reduce, reduce_scatter, all_gather, all_to_all, broadcast or send_receive."""
    rank: int
    """Who handed it in."""
    peer: int
    """To whom it was sent; -1: a collective of a group."""
    calls: int
    payload_bytes: int


class Tally:
    """Counts what a rank hands in."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._counts: dict[tuple[str, str, int], list[int]] = defaultdict(lambda: [0, 0])

    def add(self, name: str, operation: str, tensor: Tensor, peer: int = -1) -> None:
        """Count one call: see `Sent`."""
        count = self._counts[name, operation, peer]
        count[0] += 1
        count[1] += tensor.numel() * tensor.element_size()

    def sent(self) -> list[Sent]:
        """All counts so far, sorted."""
        return sorted(
            Sent(name, operation, self._rank, peer, *count)
            for (name, operation, peer), count in self._counts.items()
        )

    def clear(self) -> None:
        """Begin to count anew, as after a warm-up."""
        self._counts.clear()


class Collectives:
    """What the ranks of one group do together. Every rank of the group calls the same in turn.

    A group is made, and all of its pairs are tried out, when this object is: all ranks of the run
    make the same groups in the same order. No communicator is made later.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        tally: Tally,
        device: torch.device | str = "cpu",
        link: EmulatedLink | None = None,
        *,
        two_ways: bool = False,
    ) -> None:
        """Make the group.

        Args:
            ranks: of the whole run, in the order of their places in the group.
            tally: counts the payload; the groups of a rank share one.
            device: of the tensors that will be sent, besides small ones on the CPU.
            link: delays every delivery as if the ranks were that far apart.
            two_ways: for messages of `backends/m2n.py`, a group for either direction: NCCL keeps
                those of two ranks in one queue, in which a rank that has sent several and one that
                first answers would wait for each other.

        Raises:
            ValueError: ranks that repeat or are not in the run.
        """
        world = dist.get_world_size()
        if len(set(ranks)) < len(ranks) or not all(0 <= rank < world for rank in ranks):
            raise ValueError(f"ranks={list(ranks)} must be distinct ranks of 0 to {world - 1}")
        self.ranks = tuple(ranks)
        self.size = len(ranks)
        self.tally = tally
        self.device = torch.device(device)
        everyone = self.ranks == tuple(range(world))
        self._group: Any = dist.group.WORLD if everyone else dist.new_group(list(ranks))
        self.ways: tuple[Any, Any] = (self._group, self._group)
        """Of both directions."""
        if two_ways:
            self.ways = (dist.new_group(list(ranks)), dist.new_group(list(ranks)))
        self._is_member = dist.get_rank() in self.ranks
        self.place = self.ranks.index(dist.get_rank()) if self._is_member else -1
        """This rank's place in the group; -1: it is in none."""
        self._link = link
        self._pending: deque[tuple[Any, Tensor]] = deque()
        if self._is_member:
            self._warm({torch.device("cpu"), torch.device(device)})

    def all_reduce(self, tensor: Tensor, name: str) -> Tensor:
        """The sum over the ranks, in place; payload: the tensor."""
        self.tally.add(name, "all_reduce", tensor)
        due_s = self._due_s("all_reduce", tensor)
        dist.all_reduce(tensor, group=self._group)
        return self._arrive(tensor, due_s)

    def reduce_scatter(self, tensor: Tensor, name: str) -> Tensor:
        """This rank's part of the sum; payload: the tensor handed in.

        Args:
            tensor: [size * n, ...]; rank i gets the sum of the rows i n to (i + 1) n.
            name: see `Sent`.

        Raises:
            ValueError: the rows do not divide among the ranks.
        """
        rows = self._rows_each(tensor, "reduce_scatter")
        self.tally.add(name, "reduce_scatter", tensor)
        due_s = self._due_s("reduce_scatter", tensor)
        part = tensor.new_empty((rows, *tensor.shape[1:]))
        _reduce_scatter(part, tensor.contiguous(), group=self._group)
        return self._arrive(part, due_s)

    def all_gather(self, tensor: Tensor, name: str) -> Tensor:
        """The tensors of all ranks, [size * n, ...] for [n, ...]; payload: this rank's own."""
        self.tally.add(name, "all_gather", tensor)
        due_s = self._due_s("all_gather", tensor)
        whole = tensor.new_empty((self.size * tensor.shape[0], *tensor.shape[1:]))
        _all_gather(whole, tensor.contiguous(), group=self._group)
        return self._arrive(whole, due_s)

    def all_to_all(
        self,
        tensor: Tensor,
        name: str,
        send_rows: Sequence[int] | None = None,
        receive_rows: Sequence[int] | None = None,
    ) -> Tensor:
        """Rows to every rank, and rows from every rank; payload: the tensor handed in.

        Args:
            tensor: [rows, ...], those for rank 0 first.
            name: see `Sent`.
            send_rows: how many go to each rank; None: equally many.
            receive_rows: how many come from each rank; None: equally many.

        Raises:
            ValueError: the rows do not divide, or the counts do not add up.
        """
        send, receive = send_rows, receive_rows
        if (send is None) != (receive is None):
            raise ValueError("give both send_rows and receive_rows for an uneven exchange, or none")
        if send is None or receive is None:
            send = receive = [self._rows_each(tensor, "all_to_all")] * self.size
        if sum(send) != len(tensor) or len(send) != self.size or len(receive) != self.size:
            raise ValueError(
                f"send_rows={list(send)} and receive_rows={list(receive)} must have one entry for "
                f"each of {self.size} ranks, the former adding up to the {len(tensor)} rows"
            )
        self.tally.add(name, "all_to_all", tensor)
        due_s = self._due_s("all_to_all", tensor)
        mixed = tensor.new_empty((sum(receive), *tensor.shape[1:]))
        dist.all_to_all_single(
            mixed, tensor.contiguous(), list(receive), list(send), group=self._group
        )
        return self._arrive(mixed, due_s)

    def broadcast(self, tensor: Tensor, name: str, source: int = 0) -> Tensor:
        """The tensor of the rank at place `source`, in place; payload: counted at the source."""
        if self.place == source:
            self.tally.add(name, "broadcast", tensor)
        due_s = self._due_s("broadcast", tensor)
        dist.broadcast(tensor, group=self._group, group_src=source)
        return self._arrive(tensor, due_s)

    def send(self, tensor: Tensor, name: str, to: int) -> None:
        """Send to the rank at place `to` and go on; the tensor must not change until it is there.

        Payload: the tensor, counted for this pair.

        Raises:
            ValueError: it is this rank itself.
        """
        self._require_other(to)
        self.tally.add(name, "send_receive", tensor, self.ranks[to])
        while len(self._pending) > MAX_PENDING * self.size:
            self._pending.popleft()[0].wait()
        tensor = tensor.contiguous()
        if self._link is not None:
            self._post(self._link.stamp(tensor, to), to)
        self._post(tensor, to)

    def receive(self, tensor: Tensor, source: int) -> Tensor:
        """Fill the tensor with what the rank at place `source` sends next.

        Raises:
            ValueError: it is this rank itself.
        """
        self._require_other(source)
        if self._link is None:
            dist.recv(tensor, group=self._group, group_src=source)
            return tensor
        due = torch.empty(1, dtype=torch.float64)
        dist.recv(due, group=self._group, group_src=source)
        dist.recv(tensor, group=self._group, group_src=source)
        return self._link.deliver(tensor, float(due))

    def flush(self) -> None:
        """Wait until all that was sent has been received."""
        for work, _ in self._pending:
            work.wait()
        self._pending.clear()

    def _require_other(self, place: int) -> None:
        if place == self.place or not 0 <= place < self.size:
            raise ValueError(
                f"place {place} must be that of another rank, 0 to {self.size - 1} without "
                f"{self.place}; what a rank keeps it need not send"
            )

    def _post(self, tensor: Tensor, to: int) -> None:
        work = dist.isend(tensor, group=self._group, group_dst=to)
        self._pending.append((work, tensor))

    def _rows_each(self, tensor: Tensor, operation: str) -> int:
        rows = tensor.shape[0]
        if rows % self.size:
            raise ValueError(
                f"{operation} of {rows} rows must divide among {self.size} ranks; pad them"
            )
        return rows // self.size

    def _due_s(self, operation: str, tensor: Tensor) -> float:
        return 0.0 if self._link is None else self._link.due_s(operation, tensor, self.size)

    def _arrive(self, tensor: Tensor, due_s: float) -> Tensor:
        if self._link is None:
            return tensor
        due = torch.tensor([due_s], dtype=torch.float64)
        dist.all_reduce(due, dist.ReduceOp.MAX, group=self._group)
        return self._link.deliver(tensor, float(due))

    def _warm(self, devices: set[torch.device]) -> None:
        """Every pair in both directions, and every kind of collective."""
        for device in devices:
            one = torch.ones(self.size, device=device)
            for first in range(self.size):
                for second in range(first + 1, self.size):
                    self._try_pair(one, first, second)
            dist.all_reduce(one, group=self._group)
            dist.broadcast(one, group=self._group, group_src=0)
            dist.all_to_all_single(torch.empty_like(one), one, group=self._group)
            _all_gather(one.new_empty(self.size**2), one, group=self._group)
            _reduce_scatter(one.new_empty(1), one, group=self._group)

    def _try_pair(self, tensor: Tensor, first: int, second: int) -> None:
        for source, target in ((first, second), (second, first)):
            if self.place == source:
                dist.send(tensor, group=self._group, group_dst=target)
            elif self.place == target:
                dist.recv(torch.empty_like(tensor), group=self._group, group_src=source)
