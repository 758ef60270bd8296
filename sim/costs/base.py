"""What a cost of a serving iteration is: seconds from the iteration's shape, without state."""

from typing import Protocol

from sim.models.work import IterationShape

SHORT_RUN = 12
"""Decode stretches shorter than this are costed faster without numpy; the bits are the same."""


class IterationCost(Protocol):
    """Seconds of one replica's iterations. Pure: the same shape always costs the same."""

    def iteration_s(self, shape: IterationShape) -> float:
        """Seconds of one iteration."""
        ...

    def decode_run_s(self, num_decodes: int, decode_context: int, iterations: int) -> list[float]:
        """Seconds of each of `iterations` consecutive decode-only iterations.

        Equal bit for bit to `iteration_s` of each: the context grows by `num_decodes` a step.

        Args:
            num_decodes: requests that decode.
            decode_context: tokens of KV that the first iteration reads, its own included.
            iterations: how many, at least one.
        """
        ...


class StagedCost(IterationCost, Protocol):
    """A cost that knows what the last of several pipeline stages does beside its layers."""

    @property
    def slow_down(self) -> float:
        """How many times as long a stage takes while others compute; 1 where they share nothing."""
        ...

    def sampled_s(self, positions: int) -> float:
        """Of an iteration's seconds, those of the lm_head and sampling for so many positions."""
        ...


def decode_shape(num_decodes: int, decode_context: int) -> IterationShape:
    """The shape of an iteration that only decodes."""
    return IterationShape(0, 0, 0, 0, num_decodes, decode_context, num_decodes)
