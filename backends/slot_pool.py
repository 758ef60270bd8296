"""The KV of one elastic instance: a slot a token, whoever's and from wherever in its request.

What is free, owned or written is read off `owner` and `written`, as in `PagedKVCache`; the lists
beside them only remember which slots a request has, in the order in which they were stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backends.corruption import Corruption
from backends.kernels.paged import KvCache
from backends.kv_cache import FREE
from sim.models.architecture import Architecture

Ints = NDArray[np.int64]
ROOM = 64
"""Entries that a request's list begins with; doubled when it is full."""


class PoolCounts(NamedTuple):
    """What a pool says of itself."""

    free_slots: int
    written_bytes: int
    """Payload that was really stored since the start, what migration brought included."""
    read_bytes: int
    """Payload that decode attention read from the pool since the start."""
    freed_bytes: int
    """Payload that was stored and has been given up since the start."""


class _Held:
    """Slots and positions of one request here, in the order in which they were stored."""

    def __init__(self) -> None:
        self._rows: Ints = np.zeros((2, ROOM), np.int64)
        self.count = 0

    def append(self, slots: Ints, positions: Ints) -> None:
        end = self.count + len(slots)
        while end > self._rows.shape[1]:
            self._rows = np.concatenate((self._rows, np.zeros_like(self._rows)), 1)
        self._rows[:, self.count : end] = slots, positions
        self.count = end

    def drop_first(self, count: int) -> None:
        self._rows = self._rows[:, count:].copy() if count < self.count else _Held()._rows
        self.count -= count

    @property
    def slots(self) -> Ints:
        return self._rows[0, : self.count]

    @property
    def positions(self) -> Ints:
        return self._rows[1, : self.count]


class SlotPool:
    """Keys and values of every layer in slots, and who has which."""

    def __init__(
        self,
        config: Architecture,
        num_slots: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if num_slots < 1:
            raise ValueError(f"num_slots={num_slots} must be at least 1")
        shape = (num_slots, config.num_kv_heads, config.head_dim)
        # Zeros, not empty: what a fault leaves unwritten must be finite.
        self.layers = [
            KvCache(*(torch.zeros(shape, device=device, dtype=dtype) for _ in range(2)))
            for _ in range(config.num_layers)
        ]
        """Per layer key and value [num_slots, num_kv_heads, head_dim]"""
        self.num_slots = num_slots
        self.owner = torch.full((num_slots,), FREE, dtype=torch.int64)
        """int64 [num_slots], the request whose token each slot holds, or FREE"""
        self.written = torch.zeros(num_slots, dtype=torch.bool)
        self.corrupt: Corruption | None = None
        self.written_tokens = self.read_tokens = self.freed_tokens = 0
        self._held: dict[int, _Held] = {}
        self._num_frees = 0

    @property
    def free_slots(self) -> int:
        """Slots that nobody owns, counted from `owner`."""
        return int((self.owner == FREE).sum())

    @property
    def token_bytes(self) -> int:
        """Payload of one token: its keys and values in all layers."""
        rows = [part[0] for layer in self.layers for part in layer]
        return sum(row.numel() * row.element_size() for row in rows)

    def counts(self) -> PoolCounts:
        """Free slots and bytes now."""
        size = self.token_bytes
        tokens = self.written_tokens, self.read_tokens, self.freed_tokens
        return PoolCounts(self.free_slots, *(count * size for count in tokens))

    def holds(self, request_id: int) -> bool:
        """Whether a request has slots here."""
        return request_id in self._held

    def allocate(self, wanted: Sequence[tuple[int, Ints]]) -> list[Ints]:
        """Give requests slots for tokens at positions.

        Args:
            wanted: (request, positions int64 [tokens]); a request may come again.

        Returns:
            The slots of each entry, int64 [tokens].

        Raises:
            ValueError: too few slots are free; nothing was taken.
        """
        total = sum(len(positions) for _, positions in wanted)
        free = (self.owner == FREE).nonzero()[:total, 0].numpy()
        if len(free) < total:
            raise ValueError(
                f"{total} tokens of requests {sorted({one for one, _ in wanted})} need a slot each,"
                f" and free_slots={len(free)} of {self.num_slots}; drop a request first"
            )
        ends = np.cumsum([len(positions) for _, positions in wanted])
        parts: list[Ints] = np.split(free, ends[:-1]) if wanted else []
        for (request_id, positions), slots in zip(wanted, parts, strict=True):
            if len(slots):
                self.owner[torch.from_numpy(slots)] = request_id
                self._held.setdefault(request_id, _Held()).append(slots, positions)
        return parts

    def slots(self, request_id: int) -> Ints:
        """Slots of a request here, int64 [tokens], in the order in which they were stored."""
        held = self._held.get(request_id)
        return np.zeros(0, np.int64) if held is None else held.slots

    def positions(self, request_id: int) -> Ints:
        """Positions of the tokens in `slots`."""
        held = self._held.get(request_id)
        return np.zeros(0, np.int64) if held is None else held.positions

    def parts(self, request_ids: Iterable[int]) -> tuple[Tensor, Tensor]:
        """All slots of requests on the CPU: int64 [tokens], and starts int32 [requests + 1]."""
        found = [self.slots(request_id) for request_id in request_ids]
        starts = np.cumsum([0, *map(len, found)])
        slots = np.concatenate(found) if found else np.zeros(0, np.int64)
        return torch.from_numpy(slots), torch.from_numpy(starts.astype(np.int32))

    def begin_write(self, slots: Tensor) -> Tensor | None:
        """Count slots int64 [tokens] that are about to be written in every layer.

        Returns:
            int64 [kept], which of the rows may be written; None: all.
        """
        fault, kept = self.corrupt, None
        if fault is not None and fault.kind == "drop_copy":
            struck = fault.index - self.written_tokens
            if 0 <= struck < len(slots):
                kept = torch.tensor([row for row in range(len(slots)) if row != struck])
                slots = slots[kept]
                self.corrupt = None
        self.written_tokens += len(slots)
        self.written[slots] = True
        return kept

    def count_read(self, tokens: int) -> None:
        """Count tokens whose keys and values attention is about to read in every layer."""
        self.read_tokens += tokens

    def first(self, request_id: int, tokens: int) -> tuple[Tensor, Ints]:
        """Slots (int64, on the CPU) and positions of the first tokens that a request has here.

        Raises:
            ValueError: it has fewer.
        """
        slots, positions = self.slots(request_id), self.positions(request_id)
        if len(slots) < tokens:
            raise ValueError(
                f"{tokens} tokens of request {request_id} are to move and {len(slots)} are here"
            )
        return torch.from_numpy(slots[:tokens].copy()), positions[:tokens].copy()

    def give_up(self, request_id: int, tokens: int) -> None:
        """Free the first tokens that a request has here: they have moved."""
        held = self._held[request_id]
        self._empty(held.slots[:tokens].copy())
        held.drop_first(tokens)
        if not held.count:
            del self._held[request_id]

    def free(self, request_id: int) -> None:
        """Free all that a request has here, if anything."""
        held = self._held.pop(request_id, None)
        if held is None:
            return
        self._num_frees += 1
        if self.corrupt != Corruption(kind="skip_free", index=self._num_frees - 1):
            self._empty(held.slots)

    def _empty(self, slots: Ints) -> None:
        rows = torch.from_numpy(slots)
        self.freed_tokens += int(self.written[rows].sum())
        self.written[rows] = False
        self.owner[rows] = FREE

    def check(self) -> None:
        """Assert that lists and tensors agree: a slot is listed once, by its owner."""
        listed = [(int(slot), one) for one, held in self._held.items() for slot in held.slots]
        assert len({slot for slot, _ in listed}) == len(listed), "a slot is listed twice"
        assert all(int(self.owner[slot]) == one for slot, one in listed)
        owned = int((self.owner != FREE).sum())
        assert owned == len(listed), f"{owned - len(listed)} slots are owned by no live request"
        assert not bool(self.written[self.owner == FREE].any()), "a free slot holds a token"
