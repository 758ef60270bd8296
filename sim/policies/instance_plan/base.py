"""Instance plans: which instances of a model form a group, and which phases a group serves."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

from sim.policies.base import Policy


class InstanceGroup(NamedTuple):
    """Instances that compute one batch together."""

    instances: tuple[int, ...]
    prefills: bool
    """Whether requests may begin here."""
    decodes: bool
    """Whether requests may go on here after their prefill."""


@dataclass(kw_only=True)
class InstancePlan(Policy):
    """Groups the instances of a deployment."""

    @abstractmethod
    def groups(self, memory: Any, num_instances: int) -> tuple[InstanceGroup, ...]:
        """The groups from now on; every instance is in exactly one.

        Args:
            memory: what `init` made; the only argument that may change.
            num_instances: instances of the deployment, at least one.
        """
