"""What the gates of a model choose while it serves: a routing that can be replayed elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backends.experts import Gate, Mixture
from backends.forward_batch import ForwardBatch
from backends.kernels.expert_gate import Routed
from backends.kv_cache import PagedKVCache
from backends.transformer import Transformer
from sim.workload.token_routing.base import Tokens


class RoutingRecord:
    """The choices of all gates by layer, request and position; what is computed again counts once.

    Attached to a model on one rank, whose passes it sees from then on.
    """

    def __init__(self, model: Transformer) -> None:
        """Attach to every gate of a model.

        Raises:
            ValueError: it has no layer with experts.
        """
        self._model, self._begin = model, model.begin
        self._tokens = Tokens(np.zeros(0, np.int64), np.zeros(0, np.int64))
        self._chosen: list[tuple[int, Tokens, NDArray[np.int32]]] = []
        number = 0
        for layer in model.layers:
            if isinstance(layer.mlp, Mixture):
                layer.mlp.gate = _Watched(layer.mlp.gate, number, self)
                number += 1
        if not number:
            raise ValueError(
                f"model {model.config.name} has no layer with experts, so that nothing is routed"
            )
        model.begin = self._watch  # pyright: ignore[reportAttributeAccessIssue]

    def note(self, layer: int, expert_ids: Tensor) -> None:
        """A gate has chosen for the tokens of the pass under way."""
        self._chosen.append((layer, self._tokens, expert_ids.cpu().numpy().astype(np.int32)))

    def clear(self) -> None:
        """Forget all, as after a warm-up."""
        self._chosen.clear()

    def table(self) -> tuple[Tokens, NDArray[np.int64], NDArray[np.int32]]:
        """All choices, a row each: tokens, layers [rows] and expert ids [rows, top_k]."""
        return choices(self._chosen)

    def _watch(self, batch: ForwardBatch, cache: PagedKVCache) -> Any:
        slots = batch.slot_mapping
        owners = cache.owner[torch.div(slots, cache.block_size, rounding_mode="floor")]
        self._tokens = Tokens(owners.numpy().copy(), batch.positions.numpy().copy())
        return self._begin(batch, cache)


class _Watched(Gate):
    """A gate whose choices are noted."""

    def __init__(self, gate: Gate, layer: int, record: RoutingRecord) -> None:
        self._gate, self._layer, self._record = gate, layer, record

    def __call__(self, hidden: Tensor) -> Routed:
        """As the gate itself."""
        routed = self._gate(hidden)
        self._record.note(self._layer, routed.expert_ids)
        return routed


def choices(
    chosen: list[tuple[int, Tokens, NDArray[np.int32]]],
) -> tuple[Tokens, NDArray[np.int64], NDArray[np.int32]]:
    """Choices of many passes as one table, each (layer, request, position) once, sorted."""
    layers = np.concatenate([np.full(len(ids), layer) for layer, _, ids in chosen])
    requests = np.concatenate([tokens.request_ids for _, tokens, _ in chosen])
    positions = np.concatenate([tokens.positions for _, tokens, _ in chosen])
    expert_ids = np.concatenate([ids for _, _, ids in chosen])
    _, first = np.unique(np.stack([layers, requests, positions]), axis=1, return_index=True)
    tokens = Tokens(requests[first], positions[first])
    return tokens, layers[first].astype(np.int64), expert_ids[first]
