"""A dense decoder over a paged KV cache: one forward pass for decodes and prefill chunks together.

The layer of llama, mistral, qwen2 and qwen3: norm, attention with grouped keys, norm, SwiGLU. One
rank has all of it, or its share (`backends/shards.py`) and peers to make up for the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import silu

from backends.checkpoints import INVERSE_FREQUENCIES
from backends.forward_batch import Chunk, ForwardBatch
from backends.kernels.paged import KvCache
from backends.kernels.rotary_kv_write import Rotation, rotary_tables
from backends.kv_cache import PagedKVCache
from backends.kv_layout import uses_kernels
from backends.linear import Linear
from backends.operators import KernelOperators, Operators, TorchOperators
from backends.peers import Alone, Peers
from backends.sampling import Sampler
from sim.models.architecture import Architecture


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
    ) -> None:
        self.config, self.device, self.dtype = config, torch.device(device), dtype
        self._peers = peers or Alone()
        window = config.sliding_window or config.max_position_embeddings
        self.max_context = min(window, config.max_position_embeddings)
        """Longest context in tokens: within it a sliding window hides nothing."""
        # TF32 would cost ten bits of the mantissa, and the comparison with a reference its meaning.
        torch.backends.cuda.matmul.allow_tf32 = False
        with torch.inference_mode():
            place = _Placer(weights, self.device, dtype)
            self._embedding = place.maybe("model.embed_tokens.weight")
            # A stage before the last has neither.
            self._norm = place.maybe("model.norm.weight")
            head = "model.embed_tokens" if config.tie_embeddings else "lm_head"
            self._head = None if self._norm is None else place.linear(head)
            frequencies = weights[INVERSE_FREQUENCIES].to(self.device)
            self._cos, self._sin = rotary_tables(frequencies, self.max_context)
            self._layers = [
                _Layer(config, place, f"model.layers.{index}.", self._peers)
                for index in range(config.num_layers)
            ]
        self._warm_tokens: set[int] = set()
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
        if batch.max_context > self.max_context:
            raise ValueError(
                f"context of {batch.max_context} tokens must not exceed {self.max_context}, the "
                f"window of {self.config.name}; shorten the prompt or the answer"
            )
        slots = cache.begin_write(batch.slot_mapping)
        cache.count_read(batch.context_lengths)
        rotation = Rotation(self._cos, self._sin, batch.positions.to(self.device))
        operators: Operators = self._operators(self.config, batch, slots, rotation)
        x = self._embed(batch.token_ids) if hidden is None else hidden
        residual = torch.zeros_like(x)
        for layer, kv in zip(self._layers, cache.layers, strict=True):
            x, residual = layer(x, residual, kv, operators)
        if self._head is None or self._norm is None:
            return x + residual
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

    def _embed(self, token_ids: Tensor) -> Tensor:
        assert self._embedding is not None
        return self._peers.embed(token_ids.to(self.device), self._embedding)

    @torch.inference_mode()
    def warm_up(self, tokens: Iterable[int], sampled: Iterable[int]) -> None:
        """Multiply by every shape of weight once for each number of rows.

        Matrix libraries make a kernel for each number of rows when they first meet it, which takes
        a good part of an iteration. A server does that before it serves.

        Args:
            tokens: numbers of tokens that an iteration may have.
            sampled: numbers of tokens that it may sample.
        """
        linears = self._layers[0].linears
        for rows in sorted(set(tokens) - self._warm_tokens):
            for linear in linears:
                linear(torch.zeros(rows, linear.inputs, device=self.device, dtype=self.dtype))
            self._warm_tokens.add(rows)
        if self._head is None:
            return
        for rows in sorted(set(sampled) - self._warm_sampled):
            shape = (rows, self._head.inputs)
            self._head(torch.zeros(shape, device=self.device, dtype=self.dtype))
            self._warm_sampled.add(rows)


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


class _Layer:
    """One layer; what comes out is not yet added to the residual, the next norm does that."""

    def __init__(self, config: Architecture, place: _Placer, prefix: str, peers: Peers) -> None:
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        self._peers = peers
        self._head_dim = config.head_dim
        self._num_heads, self._num_kv_heads = config.num_heads, config.num_kv_heads
        self._input_norm = place(f"{prefix}input_layernorm.weight")
        self._mlp_norm = place(f"{prefix}post_attention_layernorm.weight")
        self._qkv = place.linear(*(f"{attention}{part}_proj" for part in "qkv"))
        self._output = place.linear(f"{attention}o_proj")
        self._gate_up = place.linear(f"{mlp}gate_proj", f"{mlp}up_proj")
        self._down = place.linear(f"{mlp}down_proj")
        self._qk_norm: tuple[Tensor, Tensor] | None = None
        if config.qk_norm:
            norms = (place(f"{attention}{part}_norm.weight") for part in "qk")
            self._qk_norm = (next(norms), next(norms))

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Its matrix products."""
        return self._qkv, self._output, self._gate_up, self._down

    def __call__(
        self, x: Tensor, residual: Tensor, cache: KvCache, operators: Operators
    ) -> tuple[Tensor, Tensor]:
        normed, residual = operators.add_norm(x, residual, self._input_norm)
        heads = self._qkv(normed).view(len(x), -1, self._head_dim)
        if self._qk_norm is not None:
            heads = self._normalise(heads, self._qk_norm, operators)
        query = operators.turn_and_store(heads, cache)
        attended = operators.attend(query, cache)
        x = self._peers.add(self._output(attended.reshape(len(x), -1)), "attention_output")
        normed, residual = operators.add_norm(x, residual, self._mlp_norm)
        gate, up = self._gate_up(normed).chunk(2, -1)
        return self._peers.add(self._down(silu(gate).mul_(up)), "mlp_output"), residual

    def _normalise(
        self, heads: Tensor, weights: tuple[Tensor, Tensor], operators: Operators
    ) -> Tensor:
        sizes = [self._num_heads, self._num_kv_heads, self._num_kv_heads]
        query, key, value = heads.split(sizes, 1)
        normed = (operators.norm(query, weights[0]), operators.norm(key, weights[1]))
        return torch.cat((*normed, value), 1)


class _Placer:
    """Takes weights by name and puts them on the device, several as one where they are fused."""

    def __init__(
        self, weights: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
    ) -> None:
        self._weights, self._device, self._dtype = weights, device, dtype

    def __call__(self, name: str) -> Tensor:
        return self._weights[name].to(self._device, self._dtype)

    def maybe(self, name: str) -> Tensor | None:
        """None where this rank's share lacks it."""
        return self(name) if name in self._weights else None

    def linear(self, *names: str) -> Linear:
        """One linear layer that computes those of `names` side by side."""
        weight = torch.cat([self(f"{name}.weight") for name in names])
        biases = [self(f"{name}.bias") for name in names if f"{name}.bias" in self._weights]
        return Linear(weight, torch.cat(biases) if biases else None)
