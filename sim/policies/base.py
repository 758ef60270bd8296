"""What every policy is: a record of hyper-parameters whose methods decide and hide nothing."""

from abc import ABC
from dataclasses import dataclass
from typing import Any


@dataclass(kw_only=True)
class Policy(ABC):  # noqa: B024  the families below it say what is abstract
    """A pure decision. Its fields are its hyper-parameters and its Hydra schema.

    A method changes its `memory` argument at most. It reads no clock, file or random source, and
    the same policy object serves any number of runs at once.
    """

    def init(self) -> Any:
        """A fresh memory for one run; None for a policy that remembers nothing."""
        return None
