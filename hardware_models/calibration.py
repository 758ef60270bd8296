"""What was fitted on a machine, and how well the fit predicts shapes that it has not seen."""

from dataclasses import dataclass, field

from hardware_models.checks import (
    require_all_not_negative,
    require_increasing,
    require_not_negative,
    require_positive,
    require_text,
)

COEFFICIENTS = ("prefill_pair_s", "prefill_s", "decode_s", "context_token_s")
"""Seconds for each causal pair of a chunk, each chunk, each decoding request, and each token of KV
that the decoding requests read."""


@dataclass(kw_only=True)
class FittedIteration:
    """Seconds of one engine iteration of one model: fitted, then judged on held-out shapes."""

    body_tokens: list[float]
    """Tokens of a batch at which body_s is given; strictly increasing, at least two."""
    body_s: list[float]
    """Seconds of all layers' matrix products at each of them; between them a line."""
    head_tokens: list[float]
    """Sampled positions at which head_s is given; strictly increasing, at least two."""
    head_s: list[float]
    """Seconds of the lm_head and sampling at each of them; between them a line."""
    coefficients: dict[str, float]
    """Further coefficients by name, in seconds: see `COEFFICIENTS`."""
    heldout_median_error: float
    """Median of |predicted - measured| / measured on held-out shapes (no unit)."""
    heldout_p90_error: float
    """90th percentile of the same (no unit)."""
    max_context_tokens: int
    """Largest context that was measured, per decoding request, tokens."""
    num_shapes: int
    """Shapes that the fit saw."""
    num_heldout: int
    """Shapes that it was judged on."""
    dtype: str
    """Type of weights and activations, such as fp32."""
    jitter: list[float] = field(default_factory=list[float])
    """Quantiles, evenly spaced, of an iteration's seconds over the mean of its like; empty: not
    measured."""

    def __post_init__(self) -> None:
        for name in ("body", "head"):
            tokens: list[float] = getattr(self, f"{name}_tokens")
            seconds: list[float] = getattr(self, f"{name}_s")
            if len(tokens) != len(seconds) or len(tokens) < 2:
                raise ValueError(
                    f"FittedIteration: {name}_s has {len(seconds)} values for {len(tokens)} "
                    f"{name}_tokens; give one value for each, and at least two"
                )
            require_increasing(self, f"{name}_tokens", tokens)
            require_all_not_negative(self, f"{name}_tokens", enumerate(tokens))
            require_all_not_negative(self, f"{name}_s", enumerate(seconds))
        if sorted(self.coefficients) != sorted(COEFFICIENTS):
            raise ValueError(
                f"FittedIteration: coefficients={sorted(self.coefficients)} must be "
                f"{sorted(COEFFICIENTS)}; run the calibration again"
            )
        require_all_not_negative(self, "coefficients", self.coefficients.items())
        require_not_negative(
            self,
            "heldout_median_error",
            "heldout_p90_error",
            "num_shapes",
            "num_heldout",
            "max_context_tokens",
        )
        require_all_not_negative(self, "jitter", enumerate(self.jitter))
        require_text(self, "dtype")


@dataclass(kw_only=True)
class FittedCollective:
    """Seconds of one collective: latency_s + payload / bandwidth, judged on held-out payloads."""

    operation: str
    """all_reduce, reduce_scatter, all_gather, all_to_all, broadcast or send_receive."""
    ranks: int
    """Ranks of the group; a send_receive was timed between two of them."""
    backend: str
    """What moved the bytes: gloo or nccl."""
    latency_s: float
    """Seconds of an empty payload."""
    bandwidth_bytes_per_s: float
    """Payload of one rank a second, whatever the algorithm makes of it on the wire."""
    heldout_median_error: float
    """Median of |predicted - measured| / measured on held-out payloads (no unit)."""
    heldout_worst_error: float
    """Largest of the same (no unit)."""
    run_to_run: float
    """Median of what one run makes of another at the same payload, relative (no unit)."""
    max_payload_bytes: int
    """Largest payload that was measured, bytes."""
    num_payloads: int
    """Payloads that the fit saw."""
    num_heldout: int
    """Payloads that it was judged on."""

    def __post_init__(self) -> None:
        require_text(self, "operation", "backend")
        require_positive(self, "bandwidth_bytes_per_s", "ranks")
        require_not_negative(
            self,
            "latency_s",
            "heldout_median_error",
            "heldout_worst_error",
            "run_to_run",
            "max_payload_bytes",
            "num_payloads",
            "num_heldout",
        )


@dataclass(kw_only=True)
class Calibration:
    """Everything fitted on one machine, and how to recognise that machine."""

    fingerprint: str
    """Identifies the machine; a different one makes the fits void."""
    torch_version: str
    """Version of torch that was measured."""
    threads: int
    """CPU threads that it ran with."""
    models: dict[str, FittedIteration] = field(default_factory=dict[str, FittedIteration])
    """One fit per model, by model name."""
    collectives: dict[str, FittedCollective] = field(default_factory=dict[str, FittedCollective])
    """One fit per operation and number of ranks, by both: all_reduce_2."""

    def __post_init__(self) -> None:
        require_text(self, "fingerprint", "torch_version")
        require_positive(self, "threads")
