"""What was fitted on a machine, and how well the fit predicts shapes that it has not seen."""

from dataclasses import dataclass, field

from hardware_models.checks import (
    require_increasing,
    require_not_negative,
    require_positive,
    require_text,
)


@dataclass(kw_only=True)
class FittedIteration:
    """Seconds of one engine iteration of one model: fitted, then judged on held-out shapes."""

    batch_knots: list[float]
    """Batch sizes at which batch_s is given, tokens; strictly increasing."""
    batch_s: list[float]
    """Seconds at each knot; between knots a line."""
    coefficients: dict[str, float]
    """Further coefficients by name; each name ends with its unit."""
    heldout_median_error: float
    """Median of |predicted - measured| / measured on held-out shapes (no unit)."""
    heldout_p90_error: float
    """90th percentile of the same (no unit)."""
    num_shapes: int
    """Shapes that the fit saw."""
    num_heldout: int
    """Shapes that it was judged on."""
    dtype: str
    """Type of weights and activations, such as fp32."""

    def __post_init__(self) -> None:
        if len(self.batch_knots) != len(self.batch_s):
            raise ValueError(
                f"FittedIteration: batch_s has {len(self.batch_s)} values for "
                f"{len(self.batch_knots)} batch_knots; give one value per knot"
            )
        require_increasing(self, "batch_knots", self.batch_knots)
        require_not_negative(
            self, "heldout_median_error", "heldout_p90_error", "num_shapes", "num_heldout"
        )
        require_text(self, "dtype")


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

    def __post_init__(self) -> None:
        require_text(self, "fingerprint", "torch_version")
        require_positive(self, "threads")
