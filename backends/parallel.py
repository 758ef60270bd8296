"""A replica on several ranks: tensor parallel within a stage, stages one after another.

The first rank runs the replica's loop as on one device and tells the others what to compute; each
has its share of weights and KV. Several batches may be in flight (`backends/pipeline.py`), each
with caches of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy

import torch
from torch import Tensor

from backends import orders
from backends.collectives import Collectives, Tally
from backends.emulated_link import EmulatedLink
from backends.forward_batch import Chunk, ForwardBatch
from backends.kv_cache import PagedKVCache
from backends.orders import Kind, Order
from backends.peers import TensorParallel
from backends.sampling import Sampler
from backends.shards import Share, share_of
from backends.transformer import Transformer, sample
from backends.weights import Model

__all__ = ["Driver", "Stage"]


class Stage:
    """What one rank computes: its share of the model, from what it receives to what it sends."""

    def __init__(
        self,
        model: Model,
        share: Share,
        sampler: Sampler,
        device: torch.device | str = "cpu",
        link: EmulatedLink | None = None,
    ) -> None:
        """Take a share of the model and meet the other ranks, which do the same.

        Args:
            model: the whole of it.
            share: this rank's.
            sampler: copied; used on the rank that samples.
            device: of this rank.
            link: what deliveries are delayed by; None: nothing.

        Raises:
            ValueError: the sizes do not divide the model.
        """
        self.share, self.tally, self._first_sampler = share, Tally(share.rank), sampler
        config, weights = share_of(model, share)
        everyone = range(share.tp_size * share.pp_size)
        self.world = Collectives(everyone, self.tally, device, link)
        # Orders are the engine's own: no link holds them back.
        self.control = Collectives(everyone, self.tally)
        stages = [
            Collectives(share.stage_ranks(stage), self.tally, device, link)
            for stage in range(share.pp_size)
        ]
        peers = None
        if share.tp_size > 1:
            peers = TensorParallel(stages[share.stage], config.vocab_size)
        self.model = Transformer(config, weights, device, peers=peers)
        self.new_caches(1, 1)

    def new_caches(self, num_blocks: int, block_size: int, count: int = 1) -> list[PagedKVCache]:
        """Begin anew when all ranks do: empty caches, an unused sampler, nothing sent.

        Args:
            num_blocks: of each cache.
            block_size: tokens a block.
            count: one for each batch in flight.
        """
        self.caches = [self.model.new_cache(num_blocks, block_size) for _ in range(count)]
        self.sampler = deepcopy(self._first_sampler)
        self.control.all_reduce(torch.zeros(1), orders.NAME)
        self.control.flush()
        self.world.flush()
        self.tally.clear()
        return self.caches

    @property
    def samples(self) -> bool:
        """Whether it draws the tokens: the first rank of the last stage."""
        return self.share.is_last and self.share.place == 0

    def compute(
        self, chunks: Sequence[Chunk], sampler: Sampler | None = None, lane: int = 0
    ) -> list[int]:
        """This stage's part of a forward pass; the tokens on the rank that samples, else none."""
        cache = self.caches[lane]
        batch = ForwardBatch.build(cache, chunks)
        output = self.model.forward(batch, cache, self._received(batch))
        if not self.share.is_last:
            self.world.send(output, "hidden_states", self.share.rank + self.share.tp_size)
            return []
        return sample(chunks, output, sampler or self.sampler) if self.samples else []

    def follow(self) -> None:
        """Do what the first rank says until it says stop."""
        while True:
            order = orders.hear(self.control)
            match order.kind:
                case Kind.stop:
                    self.world.flush()
                    return
                case Kind.free:
                    self._free(order)
                case Kind.new_cache:
                    self.new_caches(*order.first)
                case Kind.warm_up:
                    self.model.warm_up(order.first, order.second)
                case Kind.step:
                    self._step(order)

    def _free(self, order: Order) -> None:
        for request_id in order.first:
            self.caches[order.lane].free(request_id)

    def _step(self, order: Order) -> None:
        self._free(order)
        chunks, cache = orders.chunks_of(order), self.caches[order.lane]
        for chunk in chunks:
            cache.allocate(chunk.request_id, chunk.start + len(chunk.token_ids))
        tokens = self.compute(chunks, lane=order.lane)
        if self.samples:
            # Without a token it says all the same that the last stage is done.
            name = "tokens" if tokens else "done"
            self.world.send(torch.tensor(tokens or [0]), name, 0)

    def _received(self, batch: ForwardBatch) -> Tensor | None:
        """Hidden states of the stage before; None: this is the first."""
        if self.share.is_first:
            return None
        model = self.model
        shape = (len(batch.token_ids), model.config.hidden_size)
        hidden = torch.empty(shape, device=model.device, dtype=model.dtype)
        return self.world.receive(hidden, self.share.rank - self.share.tp_size)


class Driver:
    """The first rank's stage, and what it tells the others: an `Executor`."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._freed: list[list[int]] = [[]]
        """Of each cache, what the others are still to free."""
        self.config = stage.model.config
        self.device, self.max_context = stage.model.device, stage.model.max_context

    def new_cache(self, num_blocks: int, block_size: int) -> PagedKVCache:
        """See `Executor`. What was counted before is forgotten, on all ranks."""
        return self.new_caches(num_blocks, block_size, 1)[0]

    def new_caches(self, num_blocks: int, block_size: int, count: int) -> list[PagedKVCache]:
        """As `new_cache`, one for each batch in flight."""
        self._tell(Order(Kind.new_cache, (num_blocks, block_size, count)))
        caches = self._stage.new_caches(num_blocks, block_size, count)
        self._freed = [[] for _ in caches]
        for cache, freed in zip(caches, self._freed, strict=True):
            cache.on_free = freed.append
        return caches

    def warm_up(self, tokens: Iterable[int], sampled: Iterable[int]) -> None:
        """See `Executor`."""
        tokens, sampled = list(tokens), list(sampled)
        self._tell(Order(Kind.warm_up, tokens, sampled))
        self._stage.model.warm_up(tokens, sampled)

    def next_tokens(
        self, chunks: Sequence[Chunk], cache: PagedKVCache, sampler: Sampler
    ) -> list[int]:
        """See `Executor`. With several stages the last one's sampler draws, not this one."""
        assert cache is self._stage.caches[0], "a rank has the caches that were made last"
        tokens = self.begin(0, chunks, sampler)
        return tokens if self.samples else self.collect(sum(chunk.sample for chunk in chunks))

    @property
    def samples(self) -> bool:
        """Whether the first rank has the tokens as soon as it has computed: there is one stage."""
        return self._stage.samples

    def begin(
        self, lane: int, chunks: Sequence[Chunk], sampler: Sampler | None = None
    ) -> list[int]:
        """Compute the first stage of a batch and send it on; the tokens, if that was the last."""
        self._tell(orders.step(chunks, self._freed[lane], lane))
        self._freed[lane].clear()
        return self._stage.compute(chunks, sampler, lane)

    def collect(self, count: int) -> list[int]:
        """Wait for the tokens of the oldest batch that has been begun: so many of them."""
        drawn = torch.empty(max(count, 1), dtype=torch.int64)
        last = self._stage.share.pp_size - 1
        self._stage.world.receive(drawn, self._stage.share.stage_ranks(last)[0])
        return drawn[:count].tolist()

    def stop(self) -> None:
        """Let the other ranks go, after the blocks that are still to be freed."""
        for lane, freed in enumerate(self._freed):
            if freed:
                self._tell(Order(Kind.free, freed, lane=lane))
        self._tell(Order(Kind.stop))
        self._stage.control.flush()
        self._stage.world.flush()

    def _tell(self, order: Order) -> None:
        orders.tell(self._stage.control, order)
