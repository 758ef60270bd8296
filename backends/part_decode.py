"""Decode over KV that lies on several ranks: queries go to it, partial results come back.

A master computes everything for its requests but the attention over KV that others have. Every
member of a group, master or not, serves all masters of the group in the order of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from backends.elastic_orders import DecodeOrder, MiniBatch
from backends.forward_batch import ForwardBatch
from backends.kernels.merge_parts import merge_parts
from backends.kernels.paged import KvCache
from backends.kernels.part_decode_attention import part_decode_attention
from backends.slot_pool import SlotPool
from backends.transformer import Transformer
from backends.turning import Turning, batch_of
from backends.wires import Posted, Wires


class _Part(NamedTuple):
    """KV here of some requests of a master."""

    master: int
    slots: Tensor
    """int64 [tokens]"""
    starts: Tensor
    """int32 [requests + 1]"""

    @property
    def num_requests(self) -> int:
        return len(self.starts) - 1


class PartDecode(Turning):
    """The `Operators` of one member in one round. Slots of the tokens of a master are taken here.

    No deadlock: in every layer each master sends its queries before it waits for anything, and all
    answer in the same order; so the first answer that somebody waits for is always on its way.
    """

    def __init__(
        self, model: Transformer, pool: SlotPool, wires: Wires, order: DecodeOrder
    ) -> None:
        """Look up what this member has and whom it serves.

        Raises:
            ValueError: the pool has no room for a token of each request; nothing was taken.
        """
        self._model, self._wires, me = model, wires, wires.place
        mine = [one for one in order.mini_batches if one.master == me]
        self.mine = mine[0] if mine else MiniBatch(me, (), (), (), ())
        self._positions = torch.tensor(self.mine.positions, dtype=torch.int64)
        super().__init__(model, self._positions)
        self._store_plan(pool)
        self._own = self._part(pool, me, self.mine.request_ids)
        self._serves: list[_Part] = []
        for one in order.mini_batches:
            rows = dict(one.holders).get(me)
            if rows is not None:
                ids = [one.request_ids[row] for row in rows]
                self._serves.append(self._part(pool, one.master, ids))
        pool.count_read(sum(len(one.slots) for one in (self._own, *self._serves)))
        device = model.device
        self._holders = [
            (at, torch.tensor(rows, dtype=torch.int64, device=device))
            for at, rows in self.mine.holders
        ]
        shape = (1 + len(self._holders), len(self.mine.tokens), model.config.num_heads)
        self._outputs = torch.zeros((*shape, model.config.head_dim), device=device)
        self._lses = torch.full(shape, -torch.inf, device=device)

    def batch(self) -> ForwardBatch:
        """What this member embeds, and gives logits of: a row a request."""
        tokens = list(self.mine.tokens)
        return batch_of(tokens, self._positions, list(range(len(tokens))))

    def turn_and_store(self, heads: Tensor, cache: KvCache) -> Tensor:
        """See `Operators`."""
        query, *pair = self.turn(heads)
        for part, rows in zip(cache, pair, strict=True):
            kept = rows if self._stored is None else rows.index_select(0, self._stored)
            part.index_copy_(0, self._slots, kept)
        return query

    def attend(self, query: Tensor, cache: KvCache) -> Tensor:
        """See `Operators`. Others compute their parts while this member computes its own."""
        wires = self._wires
        # In the order in which messages of a pair are sent: a query, then an answer.
        asked = self._post_queries()
        coming = [wires.post(self._packed(query, len(rows)), at) for at, rows in self._holders]
        for at, rows in self._holders:
            wires.send(query.index_select(0, rows), "query", at)
        self._outputs[0], self._lses[0] = self._compute(query, self._own, cache)
        self._answer(asked, cache)
        for place, ((_, rows), posted) in enumerate(zip(self._holders, coming, strict=True), 1):
            packed = wires.receive(posted)
            self._outputs[place].index_copy_(0, rows, packed[..., :-1])
            self._lses[place].index_copy_(0, rows, packed[..., -1])
        return merge_parts(self._outputs, self._lses, query.dtype)

    def serve(self, cache: KvCache) -> None:
        """What a member that is no master does in a layer: answer those that are."""
        self._answer(self._post_queries(), cache)

    def _post_queries(self) -> list[Posted]:
        config, model = self._model.config, self._model
        shape = config.num_heads, config.head_dim
        empty = [
            torch.empty((one.num_requests, *shape), dtype=model.dtype, device=model.device)
            for one in self._serves
        ]
        return [
            self._wires.post(query, one.master)
            for query, one in zip(empty, self._serves, strict=True)
        ]

    def _answer(self, asked: list[Posted], cache: KvCache) -> None:
        for one, message in zip(self._serves, asked, strict=True):
            output, lse = self._compute(self._wires.receive(message), one, cache)
            self._wires.send(torch.cat((output, lse[..., None]), -1), "partial", one.master)

    def _compute(self, query: Tensor, part: _Part, cache: KvCache) -> tuple[Tensor, Tensor]:
        return part_decode_attention(
            query, cache.key, cache.value, part.slots, part.starts, self.scale
        )

    def _packed(self, query: Tensor, count: int) -> Tensor:
        """Room for outputs and lse beside each other, float32 [requests, heads, head_dim + 1]."""
        _, heads, dim = query.shape
        return torch.empty((count, heads, dim + 1), device=query.device)

    def _part(self, pool: SlotPool, master: int, request_ids: Sequence[int]) -> _Part:
        slots, starts = pool.parts(request_ids)
        device = self._model.device
        return _Part(master, slots.to(device), starts.to(device))

    def _store_plan(self, pool: SlotPool) -> None:
        """A slot for the new token of each request."""
        positions = [np.array([at], np.int64) for at in self.mine.positions]
        taken = pool.allocate(list(zip(self.mine.request_ids, positions, strict=True)))
        slots = torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *taken]))
        kept = pool.begin_write(slots)
        device = self._model.device
        self._stored = None if kept is None else kept.to(device)
        self._slots = (slots if kept is None else slots[kept]).to(device)
