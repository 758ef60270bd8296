"""What a real router chose, read back from a Parquet file; see `choices_file` for its columns."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sim.workload.token_routing.base import TokenRouting, Tokens, require_top_k
from sim.workload.token_routing.choices_file import MOST, Choices, read_choices


@dataclass(kw_only=True)
class Recorded(TokenRouting):
    """Choices looked up by layer, request and position; the seed changes nothing."""

    path: str
    """Parquet file with the columns layer, request, position and expert_ids (a list)."""

    def expert_ids(
        self, seed: int, layer: int, tokens: Tokens, num_experts: int, top_k: int
    ) -> NDArray[np.int32]:
        """As recorded, in the order of the file's lists.

        Raises:
            ValueError: the file is broken or of another model, or lacks a token.
        """
        choices = self._choices(num_experts, top_k)
        rows = choices.of_layer(layer)
        known = choices.tokens[rows]
        wanted = tokens.request_ids * (MOST + 1) + tokens.positions
        at = np.searchsorted(known, wanted)
        lacking = (tokens.positions > MOST) | (at == len(known))
        lacking[~lacking] = known[at[~lacking]] != wanted[~lacking]
        if lacking.any():
            first = int(np.flatnonzero(lacking)[0])
            raise ValueError(
                f"{self.path}: request {tokens.request_ids[first]}, position "
                f"{tokens.positions[first]} has no row for layer {layer}; record every token that "
                "is served in every layer that has experts, or choose token_routing=uniform"
            )
        return choices.expert_ids[rows][at]

    def loads(
        self, seed: int, num_layers: int, num_experts: int, top_k: int
    ) -> NDArray[np.float64]:
        """Shares of the recorded rows.

        Raises:
            ValueError: the file is broken, or has other layers than the model.
        """
        choices = self._choices(num_experts, top_k)
        rows = [choices.of_layer(layer) for layer in range(num_layers)]
        empty = [layer for layer, one in enumerate(rows) if one.start == one.stop]
        if empty or len(choices.starts) - 1 != num_layers:
            has = f"no row for layer {empty[0]}" if empty else f"layer {len(choices.starts) - 2}"
            raise ValueError(
                f"{self.path}: has {has} and must have rows for layers 0 to {num_layers - 1}, "
                "those of the model that have experts; choose the model that was recorded"
            )
        counts = [
            np.bincount(choices.expert_ids[one].ravel(), minlength=num_experts) for one in rows
        ]
        found = np.stack(counts).astype(np.float64)
        return found / found.sum(axis=1, keepdims=True)

    def _choices(self, num_experts: int, top_k: int) -> Choices:
        require_top_k(num_experts, top_k)
        file = Path(self.path).expanduser()
        # A file that was written again is read again.
        stamp = file.stat().st_mtime_ns if file.is_file() else 0
        return _read(self.path, stamp, num_experts, top_k)


@lru_cache(maxsize=4)
def _read(path: str, stamp: int, num_experts: int, top_k: int) -> Choices:
    del stamp
    return read_choices(path, num_experts, top_k)
