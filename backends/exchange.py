"""What a real replica asks of whatever joins it to other instances; a replica alone has none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from backends.observed import Sequence

if TYPE_CHECKING:
    from backends.replica import Replica


class Exchange(Protocol):
    """Hands prefilled requests over, or takes them."""

    @property
    def passes_on(self) -> bool:
        """Whether requests go on elsewhere once they are prefilled."""
        ...

    def require_served(self) -> None:
        """Refuse an end at which requests wait that were handed over to this instance.

        Raises:
            ValueError: a policy lets them wait for ever.
        """
        ...

    def settle(self, replica: Replica, now_s: float) -> None:
        """Let the replica see what has come and gone by the instant of its decision."""
        ...

    def pass_on(self, replica: Replica, sequence: Sequence, end_s: float) -> None:
        """A request has its first token and leaves; its KV stays until it is fetched."""
        ...
