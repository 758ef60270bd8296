"""A decoder over a paged KV cache: one forward pass for decodes and prefill chunks together.

The layer of llama, mistral, qwen2 and qwen3: norm, attention with grouped keys, norm, SwiGLU; or in
its place the experts of mixtral, qwen2_moe and qwen3_moe. One rank has all of it, or its share
(`backends/shards.py`) and peers to make up for the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from backends.checkpoints import INVERSE_FREQUENCIES
from backends.forward_batch import Chunk, ForwardBatch
from backends.kernels.rotary_kv_write import Rotation, rotary_tables
from backends.kv_cache import PagedKVCache
from backends.kv_layout import uses_kernels
from backends.layers import Layer
from backends.linear import Linear
from backends.operators import KernelOperators, Operators, TorchOperators
from backends.peers import Alone, Peers
from backends.placing import Placer
from backends.sampling import Sampler
from sim.models.architecture import Architecture

MOST_EXPERT_ROWS = 128
"""Up to so many rows every number is prepared for an expert; above, only those of whole batches."""


class Transformer:
    """Weights laid out for one device, and the forward pass over them.

    In float32 it computes in float32, never through TF32.
    """

    def __init__(
        self,
        config: Architecture,
        weights: Mapping[str, Tensor],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        peers: Peers | None = None,
        *,
        with_experts: bool = True,
    ) -> None:
        """Lay out a model, or a rank's share of one.

        Args:
            config: its architecture.
            weights: by their usual names (`backends/model_tensors.py`).
            device: where it computes.
            dtype: what it computes in.
            peers: the other ranks of a stage; None: there are none.
            with_experts: False where other ranks have them: sparse layers then have attention,
                norms and gate alone, their weights need no experts, and `forward` is not called.
        """
        self.config, self.device, self.dtype = config, torch.device(device), dtype
        self._peers = peers or Alone()
        window = config.sliding_window or config.max_position_embeddings
        self.max_context = min(window, config.max_position_embeddings)
        """Longest context in tokens: within it a sliding window hides nothing."""
        # TF32 would cost ten bits of the mantissa, and the comparison with a reference its meaning.
        torch.backends.cuda.matmul.allow_tf32 = False
        with torch.inference_mode():
            place = Placer(weights, self.device, dtype)
            self._embedding = place.maybe("model.embed_tokens.weight")
            # A stage before the last has neither.
            self._norm = place.maybe("model.norm.weight")
            head = "model.embed_tokens" if config.tie_embeddings else "lm_head"
            self._head = None if self._norm is None else place.linear(head)
            frequencies = weights[INVERSE_FREQUENCIES].to(self.device)
            self._cos, self._sin = rotary_tables(frequencies, self.max_context)
            self.layers = [
                Layer(config, place, index, self._peers, with_experts)
                for index in range(config.num_layers)
            ]
        self._warm_tokens: set[int] = set()
        self._warm_expert_rows: set[int] = set()
        self._warm_sampled: set[int] = set()
        self._operators = KernelOperators if uses_kernels(self.device, dtype) else TorchOperators

    @torch.inference_mode()
    def forward(
        self, batch: ForwardBatch, cache: PagedKVCache, hidden: Tensor | None = None
    ) -> Tensor:
        """Store keys and values of all rows, and return logits float32 [sampled, vocab].

        A stage before the last returns its hidden states [tokens, hidden_size].

        Args:
            batch: the rows.
            cache: of this rank, changed.
            hidden: what the stage before returned; None: the tokens are embedded here.

        Raises:
            ValueError: a context is longer than `max_context`.
        """
        operators = self.begin(batch, cache)
        x = self.embed(batch) if hidden is None else hidden
        residual = torch.zeros_like(x)
        for layer, kv in zip(self.layers, cache.layers, strict=True):
            x, residual = layer(x, residual, kv, operators)
        if self._norm is None:
            return x + residual
        return self.logits(x, residual, batch, operators)

    def begin(self, batch: ForwardBatch, cache: PagedKVCache) -> Operators:
        """What all layers need of a pass; the cache counts what the pass writes and reads.

        Whoever runs the layers of a batch one by one calls this first, then `embed`, each layer of
        `layers` or its halves, with a residual of zeros before the first, and `logits`; all of it
        under `torch.inference_mode`.

        Raises:
            ValueError: a context is longer than `max_context`.
        """
        if batch.max_context > self.max_context:
            raise ValueError(
                f"context of {batch.max_context} tokens must not exceed {self.max_context}, the "
                f"window of {self.config.name}; shorten the prompt or the answer"
            )
        slots = cache.begin_write(batch.slot_mapping)
        cache.count_read(batch.context_lengths)
        return self._operators(self.config, batch, slots, self.rotation(batch.positions))

    def rotation(self, positions: Tensor) -> Rotation:
        """The angles of tokens at positions int64 [tokens]."""
        return Rotation(self._cos, self._sin, positions.to(self.device))

    def embed(self, batch: ForwardBatch) -> Tensor:
        """What the first layer takes [tokens, hidden]; only on a stage that has the embedding."""
        assert self._embedding is not None
        return self._peers.embed(batch.token_ids.to(self.device), self._embedding)

    def logits(
        self, x: Tensor, residual: Tensor, batch: ForwardBatch, operators: Operators
    ) -> Tensor:
        """Logits float32 [sampled, vocab] from what the last layer made; only on the last stage."""
        assert self._head is not None
        assert self._norm is not None
        x, residual = (
            part.index_select(0, batch.logit_rows.to(self.device)) for part in (x, residual)
        )
        normed, _ = operators.add_norm(x, residual, self._norm)
        return self._peers.whole(self._head(normed)).float()

    def new_cache(self, num_blocks: int, block_size: int) -> PagedKVCache:
        """An empty cache for this model's keys and values."""
        return PagedKVCache(self.config, num_blocks, block_size, self.device, self.dtype)

    def next_tokens(
        self, chunks: Sequence[Chunk], cache: PagedKVCache, sampler: Sampler
    ) -> list[int]:
        """One forward pass; the next token of every chunk that wants one, in order."""
        logits = self.forward(ForwardBatch.build(cache, chunks), cache)
        return sample(chunks, logits, sampler)

    @torch.inference_mode()
    def warm_up(self, tokens: Iterable[int], sampled: Iterable[int]) -> None:
        """Multiply by every shape of weight once for each number of rows.

        Matrix libraries make a kernel for each number of rows when they first meet it, which takes
        a good part of an iteration. A server does that before it serves.

        Args:
            tokens: numbers of tokens that an iteration may have.
            sampled: numbers of tokens that it may sample.
        """
        tokens = set(tokens)
        # One layer of each kind: a model may have dense and sparse ones.
        kinds = {type(layer.mlp): layer for layer in reversed(self.layers)}.values()
        self._multiply(
            [linear for layer in kinds for linear in layer.linears], tokens, self._warm_tokens
        )
        # Of so many tokens an expert may get any number.
        few = range(1, min(max(tokens, default=0), MOST_EXPERT_ROWS) + 1)
        self._multiply(
            [linear for layer in kinds for linear in layer.mlp.expert_linears],
            tokens.union(few),
            self._warm_expert_rows,
        )
        if self._head is not None:
            self._multiply([self._head], set(sampled), self._warm_sampled)

    def _multiply(self, linears: Sequence[Linear], rows: set[int], warm: set[int]) -> None:
        """Call each of `linears` once for each number of rows that is not warm yet."""
        for count in sorted(rows - warm):
            for linear in linears:
                linear(torch.zeros(count, linear.inputs, device=self.device, dtype=self.dtype))
        warm |= rows


def sample(chunks: Sequence[Chunk], logits: Tensor, sampler: Sampler) -> list[int]:
    """The next token of every chunk that wants one, from logits [sampled, vocab], in order."""
    sampled = [chunk for chunk in chunks if chunk.sample]
    if not sampled:
        # No token comes back to wait for, and the iteration ends when its work is done.
        synchronise(logits.device)
        return []
    ids = [chunk.request_id for chunk in sampled]
    positions = [chunk.start + len(chunk.token_ids) for chunk in sampled]
    return sampler(logits, ids, positions)


def synchronise(device: torch.device) -> None:
    """Wait for a device that works on its own."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
