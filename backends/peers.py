"""What a rank's forward pass needs of the other ranks of its stage, and what it needs alone."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding

from backends.collectives import Collectives


class Peers(Protocol):
    """The three places of a forward pass at which a split model becomes whole."""

    def embed(self, token_ids: Tensor, table: Tensor) -> Tensor:
        """Rows of the token embedding [tokens, hidden] for int64 [tokens]."""
        ...

    def add(self, part: Tensor, name: str) -> Tensor:
        """The sum over the ranks of what each computed of an output [tokens, hidden]."""
        ...

    def whole(self, logits: Tensor) -> Tensor:
        """Logits of all tokens [sampled, vocab] for those of this rank's part of them."""
        ...


class Alone:
    """The only rank: it has everything."""

    def embed(self, token_ids: Tensor, table: Tensor) -> Tensor:
        """See `Peers`."""
        return embedding(token_ids, table)

    def add(self, part: Tensor, name: str) -> Tensor:
        """See `Peers`."""
        del name
        return part

    def whole(self, logits: Tensor) -> Tensor:
        """See `Peers`."""
        return logits


class TensorParallel:
    """Ranks that share every layer. Each ends up with the sum, or the whole."""

    def __init__(self, group: Collectives, vocab_size: int) -> None:
        """Take over the group of the stage's ranks, whose last part of the vocabulary is padded."""
        self._group, self._vocab_size = group, vocab_size

    def embed(self, token_ids: Tensor, table: Tensor) -> Tensor:
        """See `Peers`. Every rank looks up its part of the vocabulary; the others add zeros."""
        own = token_ids - self._group.place * len(table)
        foreign = (own < 0) | (own >= len(table))
        rows = embedding(own.masked_fill(foreign, 0), table)
        return self.add(rows.masked_fill(foreign[:, None], 0.0), "embedding")

    def add(self, part: Tensor, name: str) -> Tensor:
        """See `Peers`."""
        return self._group.all_reduce(part, name)

    def whole(self, logits: Tensor) -> Tensor:
        """See `Peers`."""
        if not len(logits):
            return logits.new_empty((0, self._vocab_size))
        parts = self._group.all_gather(logits, "logits").chunk(self._group.size)
        return torch.cat(parts, 1)[:, : self._vocab_size]
