"""The next token: greedy, or a seeded draw that only the seed, the request and the position decide.

A draw hashes its three numbers (SplitMix64, Steele et al., 2014) instead of advancing a stream, so
neither the batch a request is in nor a pre-emption can change its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen; the defaults are greedy."""

    temperature: float = 0.0
    """Logits are divided by it; 0 takes the most likely token."""
    top_k: int = 0
    """Only so many of the likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be at least 0; 0 is greedy")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must not be negative; 0 keeps all tokens")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p} must lie above 0 and up to 1; 1 keeps all tokens")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative; use 0 or more")


class Sampler:
    """Chooses tokens by one `Sampling`."""

    def __init__(self, sampling: Sampling | None = None) -> None:
        self.sampling = sampling or Sampling()

    def __call__(
        self, logits: Tensor, request_ids: Sequence[int], positions: Sequence[int]
    ) -> list[int]:
        """The token ids that follow, one a row.

        Args:
            logits: float32 [rows, vocab].
            request_ids: whose row each is.
            positions: position that each new token will have: tokens of its request before it.
        """
        if not len(logits) == len(request_ids) == len(positions):
            raise ValueError(
                f"logits of {len(logits)} rows, {len(request_ids)} request_ids and "
                f"{len(positions)} positions must be equally many"
            )
        if self.sampling.temperature == 0.0:
            return logits.argmax(-1).tolist()
        chances = uniforms(self.sampling.seed, request_ids, positions).tolist()
        # A row at a time: what is computed for a row never depends on the rows beside it.
        rows = [self._draw(row, chance) for row, chance in zip(logits, chances, strict=True)]
        return torch.stack(rows).tolist() if rows else []

    def _draw(self, logits: Tensor, chance: float) -> Tensor:
        """Inverse of the cumulative distribution at `chance`, as int64 []."""
        scaled, tokens = logits.double() / self.sampling.temperature, None
        if 0 < self.sampling.top_k < len(logits):
            scaled, tokens = scaled.topk(self.sampling.top_k)
        if self.sampling.top_p < 1.0:
            scaled, order = scaled.sort(descending=True, stable=True)
            tokens = order if tokens is None else tokens[order]
        cumulative = scaled.softmax(-1).cumsum(-1)
        total = cumulative[-1]
        if self.sampling.top_p < 1.0:
            last = torch.searchsorted(cumulative, self.sampling.top_p * total)
            total = cumulative[last.clamp(max=len(cumulative) - 1)]
        # Strictly above, so that a token of probability zero is never drawn.
        place = torch.searchsorted(cumulative, chance * total, right=True)
        place = place.clamp(max=len(cumulative) - 1)
        return place if tokens is None else tokens[place]


def uniforms(
    seed: int, request_ids: Sequence[int], positions: Sequence[int]
) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1), one for each pair of a request and a position; float64 [pairs]."""
    bits = counter_hash(seed, np.asarray(request_ids), np.asarray(positions))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def counter_hash(
    seed: int, request_ids: npt.NDArray[np.integer], positions: npt.NDArray[np.integer]
) -> npt.NDArray[np.uint64]:
    """64 random bits for each triple; the arrays broadcast against each other."""
    state = np.asarray([seed], dtype=np.uint64)
    for part in (request_ids, positions):
        state = _mix(_mix(state) ^ part.astype(np.uint64))
    return _mix(state)


def _mix(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """One step of SplitMix64; arrays of uint64 wrap around without a warning."""
    state = state + _GOLDEN
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))
