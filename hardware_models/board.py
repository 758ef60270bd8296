"""What a part draws and costs."""

from dataclasses import dataclass

from hardware_models.checks import require_not_negative, require_positive, require_text


@dataclass(kw_only=True)
class Power:
    """What a part draws from the wall side of its own board."""

    limit_w: float
    """Board power limit (TDP or TGP), watts."""
    idle_w: float | None = None
    """Draw when idle, watts; None where not published."""
    source: str
    """Document that states it."""

    def __post_init__(self) -> None:
        require_positive(self, "limit_w")
        require_not_negative(self, "idle_w")
        require_text(self, "source")


@dataclass(kw_only=True)
class Price:
    """What one part costs; prices age, so the source carries a date."""

    usd_per_hour: float | None = None
    """Rent of one chip for an hour, US dollars."""
    purchase_usd: float | None = None
    """Price of one chip, US dollars."""
    relative_to_l20: float | None = None
    """Price as a multiple of the L20's (no unit)."""
    source: str
    """Price list and date, or the paper that prints the ratio."""

    def __post_init__(self) -> None:
        require_positive(self, "usd_per_hour", "purchase_usd", "relative_to_l20")
        require_text(self, "source")
