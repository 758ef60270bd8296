"""The operators of a layer that sequence parallelism leaves as they are: norms and rotation."""

from __future__ import annotations

import torch
from torch import Tensor

from backends.forward_batch import ForwardBatch
from backends.kv_layout import uses_kernels
from backends.operators import KernelNorms, TorchNorms, whole_heads
from backends.transformer import Transformer


class Turning:
    """`Operators` without `turn_and_store` and `attend`, for tokens at given positions."""

    def __init__(self, model: Transformer, positions: Tensor) -> None:
        """Look the angles up; positions int64 [tokens]."""
        config = model.config
        kernels = uses_kernels(model.device, model.dtype)
        norms = (KernelNorms if kernels else TorchNorms)(config.norm_eps)
        self.norm, self.add_norm = norms.norm, norms.add_norm
        self._sizes = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        self.scale = config.head_dim**-0.5
        cos, sin = whole_heads(model.rotation(positions))
        self._cos, self._sin = cos.to(model.dtype), sin.to(model.dtype)
        self._half = cos.shape[-1] // 2

    def turn(self, heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value [tokens, heads of each, head_dim], the first two rotated.

        Args:
            heads: [tokens, heads of all, head_dim].
        """
        query, key, value = heads.split(self._sizes, 1)
        query, key = (
            torch.addcmul(part * self._cos, part.roll(self._half, -1), self._sin)
            for part in (query, key)
        )
        return query, key, value


def batch_of(token_ids: list[int], positions: Tensor, logit_rows: list[int]) -> ForwardBatch:
    """What a model embeds and what it gives logits of; no blocks are in it."""
    none = torch.zeros(0, dtype=torch.int32)
    return ForwardBatch(
        token_ids=torch.tensor(token_ids, dtype=torch.int64), positions=positions,
        slot_mapping=none, num_decodes=0, block_tables=none, context_lengths=none,
        query_starts=none, logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
        max_context=0, block_size=1,
    )  # fmt: skip
