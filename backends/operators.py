"""The operators between matrix products, as one iteration needs them: plain torch, or kernels.

Indices, angles and masks are made once an iteration, when one of these is made; every layer then
uses them.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import rms_norm as torch_rms_norm

from backends.forward_batch import ForwardBatch
from backends.kernels.paged import KvCache
from backends.kernels.rms_norm import rms_norm
from backends.kernels.rotary_kv_write import Rotation, rotary_kv_write
from backends.kv_layout import head_rows, scatter_rows
from backends.paged_attention import GatheredAttention, KernelAttention
from sim.models.architecture import Architecture


class Operators(Protocol):
    """What a layer calls besides its linear layers."""

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """Root-mean-square norm over the last dimension of x [..., dim], weight [dim]."""
        ...

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and that sum; all [tokens, hidden]."""
        ...

    def turn_and_store(self, heads: Tensor, cache: KvCache) -> Tensor:
        """Rotate queries and keys, store keys and values, return queries.

        Args:
            heads: [tokens, num_heads + 2 num_kv_heads, head_dim], queries, keys, values.
            cache: of this layer, changed.
        """
        ...

    def attend(self, query: Tensor, cache: KvCache) -> Tensor:
        """Attended values [tokens, num_heads, head_dim]."""
        ...


class TorchNorms:
    """The norms of `Operators` in plain torch."""

    def __init__(self, eps: float) -> None:
        self._eps = eps

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """See `Operators`."""
        return torch_rms_norm(x, weight.shape, weight, self._eps)

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See `Operators`."""
        summed = x + residual
        return torch_rms_norm(summed, weight.shape, weight, self._eps), summed


class KernelNorms:
    """The norms of `Operators` from `backends.kernels`."""

    def __init__(self, eps: float) -> None:
        self._eps = eps

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """See `Operators`."""
        return rms_norm(x.reshape(-1, x.shape[-1]), weight, self._eps).view(x.shape)

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See `Operators`."""
        return rms_norm(x, weight, self._eps, residual)


def whole_heads(rotation: Rotation) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines [tokens, 1, head_dim] of whole heads.

    Rolling a head by half its size swaps the halves that turn into each other.
    """
    cos, sin = rotation.cos[rotation.positions], rotation.sin[rotation.positions]
    return torch.cat((cos, cos), 1)[:, None, :], torch.cat((-sin, sin), 1)[:, None, :]


class KernelOperators:
    """The launchers of `backends.kernels`: Triton on CUDA, their references elsewhere."""

    def __init__(
        self, config: Architecture, batch: ForwardBatch, slots: Tensor, rotation: Rotation
    ) -> None:
        self._config, self._rotation = config, rotation
        norms = KernelNorms(config.norm_eps)
        self.norm, self.add_norm = norms.norm, norms.add_norm
        device = rotation.cos.device
        self._slots = slots.to(device)
        self.attend = KernelAttention(batch, device, config.head_dim**-0.5)

    def turn_and_store(self, heads: Tensor, cache: KvCache) -> Tensor:
        """See `Operators`. The queries are a view of `heads`, which changes."""
        kv_heads = self._config.num_kv_heads
        query, key, value = heads.split([self._config.num_heads, kv_heads, kv_heads], 1)
        rotary_kv_write(query, key, value, self._rotation, cache, self._slots)
        return query


class TorchOperators:
    """Plain torch on the CPU: fewer and larger operations than the references of the kernels."""

    def __init__(
        self, config: Architecture, batch: ForwardBatch, slots: Tensor, rotation: Rotation
    ) -> None:
        norms = TorchNorms(config.norm_eps)
        self.norm, self.add_norm = norms.norm, norms.add_norm
        self._num_heads = config.num_heads
        self._turned = config.num_heads + config.num_kv_heads
        self._cos, self._sin = whole_heads(rotation)
        self._half = self._cos.shape[-1] // 2
        stored = slots >= 0
        self._stored = None if bool(stored.all()) else stored.nonzero()[:, 0]
        places = slots if self._stored is None else slots[self._stored]
        self._rows = head_rows(places, batch.block_size, config.num_kv_heads)
        scale = config.head_dim**-0.5
        self.attend = GatheredAttention(batch, config.num_kv_heads, scale)

    def turn_and_store(self, heads: Tensor, cache: KvCache) -> Tensor:
        """See `Operators`."""
        plain, value = heads[:, : self._turned], heads[:, self._turned :]
        turned = torch.addcmul(plain * self._cos, plain.roll(self._half, -1), self._sin)
        for part, rows in zip(cache, (turned[:, self._num_heads :], value), strict=True):
            kept = rows if self._stored is None else rows[self._stored]
            scatter_rows(part, self._rows, kept)
        return turned[:, : self._num_heads]
