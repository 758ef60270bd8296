"""Seconds of what groups of instances compute, from coefficients by degree of parallelism."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from hardware_models.scaling import ScalingBase


class DecodeWork(NamedTuple):
    """What one group of a round computes."""

    mini_batches: tuple[int, ...]
    """Requests of each master, at least one each."""
    tokens: tuple[int, ...]
    """KV of the batch on each member before the round, members in the order of the group."""
    growth: tuple[int, ...]
    """Tokens that each member gets in a round: its mini-batch, or 0."""

    @property
    def num_requests(self) -> int:
        """Of the batch."""
        return sum(self.mini_batches)


class ElasticCost(Protocol):
    """Seconds of the iterations of groups. Pure."""

    def prefill_s(self, degree: int, lengths: Sequence[int]) -> float:
        """A group of so many instances computes prompts of these lengths in one iteration."""
        ...

    def round_run_s(self, groups: Sequence[DecodeWork], rounds: int) -> NDArray[np.float64]:
        """Seconds of each of so many consecutive rounds of the same groups: the slowest group's.

        Equal bit for bit to the first of one round after another.
        """
        ...


class Scaled:
    """The cost that a scaling base states."""

    def __init__(self, base: ScalingBase, overhead_s: float = 0.0) -> None:
        """Take over the coefficients.

        Args:
            base: by degree.
            overhead_s: what the engine adds to every prefill and round, beyond what was measured.
        """
        self.base, self._overhead_s = base, overhead_s

    def prefill_s(self, degree: int, lengths: Sequence[int]) -> float:
        """See `ElasticCost`."""
        squares = sum([length * length for length in lengths])
        return self._overhead_s + self.base.prefill_s(degree, sum(lengths), squares)

    def round_run_s(self, groups: Sequence[DecodeWork], rounds: int) -> NDArray[np.float64]:
        """See `ElasticCost`. A round reads the tokens that it stores, too."""
        one = self.base.decode
        steps = np.arange(1, rounds + 1)
        slowest = np.zeros(rounds)
        for group in groups:
            fixed = self.base.decode_s(group.num_requests, group.mini_batches, 0)
            fixed += self._overhead_s
            most = np.zeros(rounds, np.int64)
            for tokens, growth in zip(group.tokens, group.growth, strict=True):
                most = np.maximum(most, tokens + growth * steps)
            slowest = np.maximum(slowest, fixed + most * one.context_token_s)
        return slowest
