"""What may go wrong around a knowledge cache in mid-run."""

from typing import NamedTuple


class Mishaps(NamedTuple):
    """When KV on the GPU is lost, and how long clients wait."""

    lost_s: tuple[float, ...] = ()
    """Instants at which all KV on the GPU is lost, in order."""
    restart_s: float = 0.0
    """How long nothing is computed after a loss."""
    timeout_s: float | None = None
    """After so long a client that has no full answer leaves; None: it waits."""

    @property
    def gives_up(self) -> bool:
        """Whether clients may leave."""
        return self.timeout_s is not None


NO_MISHAPS = Mishaps()
