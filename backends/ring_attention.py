"""Prefill by a ring of ranks: striped attention that keeps KV where it will be decoded.

Token i of a request is on ring member i mod d (striped attention, Brandon et al., 2023). In each of
d turns every member attends to the block of keys and values that it has just then and passes it on.
Whoever is to keep tokens copies them out of the blocks as these come by: nothing is sent for it
(LoongServe's proactive scale-down).
"""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backends.elastic_orders import PrefillOrder
from backends.forward_batch import ForwardBatch
from backends.kernels.paged import KvCache
from backends.kernels.striped_prefill_attention import (
    Stripe,
    new_state,
    striped_prefill_attention,
)
from backends.slot_pool import SlotPool
from backends.transformer import Transformer
from backends.turning import Turning, batch_of
from backends.wires import Posted, Wires

Ints = NDArray[np.int64]


class Stripes(NamedTuple):
    """The tokens of all requests that one member computes, request by request."""

    positions: Ints
    """[tokens], each in its request."""
    starts: Ints
    """[requests + 1]"""

    @classmethod
    def of(cls, place: int, size: int, lengths: list[int]) -> Stripes:
        """Those of a place in a ring of so many members."""
        parts = [np.arange(place, length, size) for length in lengths]
        return cls(np.concatenate(parts), np.cumsum([0, *map(len, parts)]))


class _Kept(NamedTuple):
    """What of a block is kept here."""

    rows: Tensor
    """int64 [kept], of the block."""
    slots: Tensor
    """int64 [kept]"""


def kept_positions(order: PrefillOrder, instance: int) -> list[Ints]:
    """The positions of each request whose KV an instance keeps."""
    found: list[Ints] = []
    for placed in order.kept:
        ends = np.cumsum([0, *(tokens for _, tokens in placed)])
        mine = [
            np.arange(begin, begin + tokens)
            for (at, tokens), begin in zip(placed, ends.tolist(), strict=False)
            if at == instance
        ]
        found.append(np.concatenate([np.zeros(0, np.int64), *mine]))
    return found


class RingPrefill(Turning):
    """The `Operators` of one member in one prefill. Slots of all that it keeps are taken here."""

    def __init__(
        self, model: Transformer, pool: SlotPool, wires: Wires, order: PrefillOrder
    ) -> None:
        """Lay out the ring.

        Raises:
            ValueError: the pool has no room for what it is to keep; nothing was taken.
        """
        self._model, self._wires = model, wires
        lengths = [len(tokens) for tokens in order.tokens]
        self._place, self._ring = order.instances.index(wires.place), order.instances
        size = len(self._ring)
        self._stripes = [Stripes.of(at, size, lengths) for at in range(size)]
        self.own = self._stripes[self._place]
        super().__init__(model, torch.from_numpy(self.own.positions))
        self._blocks = [
            Stripe(self._int32(one.positions), self._int32(one.starts)) for one in self._stripes
        ]
        self._kept = self._keep_plan(pool, order)
        self._key = self._value = self._no_rows()
        self.keep_s = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def batch(self, order: PrefillOrder) -> tuple[ForwardBatch, list[int]]:
        """What this member embeds, and of which requests it has the last token, by their place."""
        size = len(self._ring)
        token_ids = [one for tokens in order.tokens for one in tokens[self._place :: size]]
        ends = self.own.starts[1:].tolist()
        owned = [
            at for at, tokens in enumerate(order.tokens) if (len(tokens) - 1) % size == self._place
        ]
        rows = [ends[at] - 1 for at in owned]
        return batch_of(token_ids, torch.from_numpy(self.own.positions), rows), owned

    def turn_and_store(self, heads: Tensor, cache: KvCache) -> Tensor:
        """See `Operators`; what is stored comes by in `attend`."""
        del cache
        query, self._key, self._value = self.turn(heads)
        return query

    def attend(self, query: Tensor, cache: KvCache) -> Tensor:
        """See `Operators`. One way around the ring."""
        size, place, wires = len(self._ring), self._place, self._wires
        block = torch.stack((self._key, self._value))
        tokens, heads, dim = query.shape
        state = new_state(tokens, heads, dim, query.device)
        for turn in range(size):
            owner = (place - turn) % size
            following = self._begin_turn(block, turn)
            striped_prefill_attention(
                query, (block[0], block[1]), self._blocks[place], self._blocks[owner],
                self.scale, state,
            )  # fmt: skip
            self._keep(block, owner, cache)
            if following is not None:
                block = wires.receive(following)
            wires.flush()
        return state.output.to(query.dtype)

    def pass_on(self, cache: KvCache) -> None:
        """What a member does in a layer that has no token of its own."""
        self._key = self._value = self._no_rows()
        self.attend(self._no_rows(self._model.config.num_heads), cache)

    def finish(self) -> None:
        """Add up what the copies took, once the device has done them."""
        self.keep_s += sum(begin.elapsed_time(end) / 1e3 for begin, end in self._events)
        self._events.clear()

    def _begin_turn(self, block: Tensor, turn: int) -> Posted | None:
        """Pass the block on, and let the next one come; None: this is the last turn."""
        size = len(self._ring)
        if turn == size - 1:
            return None
        coming = len(self._stripes[(self._place - turn - 1) % size].positions)
        tensor = block.new_empty((2, coming, *block.shape[2:]))
        before, after = (self._ring[(self._place + step) % size] for step in (-1, 1))
        self._wires.send(block, "ring", after)
        return self._wires.post(tensor, before)

    def _keep(self, block: Tensor, owner: int, cache: KvCache) -> None:
        """Copy what of a block is kept here."""
        kept = self._kept[owner]
        if not len(kept.rows):
            return
        begin_s, events = time.perf_counter(), self._mark()
        for part, rows in zip(cache, block, strict=True):
            part.index_copy_(0, kept.slots, rows.index_select(0, kept.rows))
        if events is None:
            self.keep_s += time.perf_counter() - begin_s
        else:
            events[1].record()
            self._events.append(events)

    def _mark(self) -> tuple[torch.cuda.Event, torch.cuda.Event] | None:
        if self._model.device.type != "cuda":
            return None
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[0].record()
        return events

    def _keep_plan(self, pool: SlotPool, order: PrefillOrder) -> list[_Kept]:
        """Which rows of each member's block go to which slots: made once, for all layers."""
        positions = kept_positions(order, self._wires.place)
        slots = pool.allocate(list(zip(order.request_ids, positions, strict=True)))
        size, device = len(self._ring), self._model.device
        plan: list[_Kept] = []
        for owner, stripes in enumerate(self._stripes):
            rows: list[Ints] = [np.zeros(0, np.int64)]
            places: list[Ints] = [np.zeros(0, np.int64)]
            for at, (wanted, free) in enumerate(zip(positions, slots, strict=True)):
                mine = wanted % size == owner
                rows.append(stripes.starts[at] + wanted[mine] // size)
                places.append(free[mine])
            index, into = (torch.from_numpy(np.concatenate(part)) for part in (rows, places))
            kept = pool.begin_write(into)
            if kept is not None:
                index, into = index[kept], into[kept]
            plan.append(_Kept(index.to(device), into.to(device)))
        return plan

    def _int32(self, numbers: Ints) -> Tensor:
        return torch.from_numpy(numbers.astype(np.int32)).to(self._model.device)

    def _no_rows(self, heads: int | None = None) -> Tensor:
        model = self._model
        shape = (0, heads or model.config.num_kv_heads, model.config.head_dim)
        return torch.empty(shape, dtype=model.dtype, device=model.device)
