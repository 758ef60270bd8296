"""How the iterations of a model get faster with more instances: measured, as data.

LoongServe's scaling information base (arXiv 2404.09526, section 5, equation 7): for each degree of
parallelism d, seconds of a prefill = a + b * sum of lengths + c * sum of squared lengths. Decode
iterations beside it, in a form of ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import isfinite


@dataclass(kw_only=True)
class PrefillScaling:
    """One degree of parallelism: so many instances that prefill a batch together."""

    base_s: float
    """Of any batch."""
    token_s: float
    """For each token."""
    square_s: float
    """For each squared length of a prompt: attention."""


@dataclass(kw_only=True)
class DecodeScaling:
    """A decode iteration of a group, from its busiest members."""

    base_s: float
    """Reading the weights, launches."""
    request_s: float
    """For each request of the batch, whoever is its master."""
    master_request_s: float
    """For each request of the largest mini-batch: the matrix products of its master."""
    context_token_s: float
    """For each token of KV on the fullest member: its share of attention."""
    exchange_s: float = 0.0
    """What a second master adds, and any further: queries go both ways."""
    source: str = ""
    """Where the numbers are from; every shipped file says it."""


@dataclass(kw_only=True)
class ScalingBase:
    """Of one model on instances of one kind."""

    name: str
    """Short name; the name of its file."""
    model: str
    """The architecture that was measured."""
    device: str
    """The GPU or CPU of the instances."""
    tp_size: int = 1
    """Ranks of an instance."""
    prefill: list[PrefillScaling]
    """Of 1, 2, 3... instances."""
    decode: DecodeScaling
    measured_degrees: list[int] = field(default_factory=list[int])
    """Degrees that rest on measurements; the others are interpolated as `source` says."""
    source: str
    """Where the numbers are from."""

    def __post_init__(self) -> None:
        if not self.prefill:
            raise ValueError(f"scaling base {self.name} has no degree of parallelism; give one")
        for degree, one in enumerate(self.prefill, 1):
            for name in ("base_s", "token_s", "square_s"):
                value = getattr(one, name)
                if not (isfinite(value) and value >= 0) or (name == "base_s" and value == 0):
                    raise ValueError(
                        f"scaling base {self.name}, {degree} instances: {name}={value} must not be "
                        "negative (and base_s not 0): a longer prompt never takes less; fit it to "
                        "longer prompts"
                    )
        for degree, (fewer, more) in enumerate(pairwise(self.prefill), 2):
            for name in ("token_s", "square_s"):
                if getattr(more, name) > getattr(fewer, name):
                    raise ValueError(
                        f"scaling base {self.name} is not monotone: {name}={getattr(more, name)} "
                        f"of {degree} instances exceeds {getattr(fewer, name)} of {degree - 1}; "
                        "leave the larger degree out, or measure it again"
                    )
        for name in ("base_s", "request_s", "master_request_s", "context_token_s", "exchange_s"):
            value = getattr(self.decode, name)
            if not (isfinite(value) and value >= 0):
                raise ValueError(
                    f"scaling base {self.name}: decode.{name}={value} must not be negative and "
                    "must be finite; it is in seconds"
                )

    @property
    def max_degree(self) -> int:
        """Instances that may prefill together."""
        return len(self.prefill)

    def prefill_s(self, degree: int, tokens: float, squares: float) -> float:
        """Seconds of a prefill.

        Args:
            degree: instances, 1 to `max_degree`.
            tokens: sum of the lengths of the prompts.
            squares: sum of their squares.

        Raises:
            ValueError: a degree that is not known.
        """
        if not 1 <= degree <= len(self.prefill):
            raise ValueError(
                f"degree={degree} is not in scaling base {self.name}, which knows 1 to "
                f"{len(self.prefill)} instances; take fewer, or measure more"
            )
        one = self.prefill[degree - 1]
        return one.base_s + one.token_s * tokens + one.square_s * squares

    def decode_s(self, num_requests: int, mini_batches: Sequence[int], most_tokens: int) -> float:
        """Seconds of a decode iteration of one group.

        Args:
            num_requests: of the batch.
            mini_batches: requests of each master, none of them 0.
            most_tokens: KV on the member that has most of it, this iteration's included.
        """
        one = self.decode
        seconds = one.base_s + num_requests * one.request_s
        seconds += max(mini_batches) * one.master_request_s
        if len(mini_batches) > 1:
            seconds += one.exchange_s
        return seconds + most_tokens * one.context_token_s
