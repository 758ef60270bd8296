"""Every instance serves its requests from prompt to end: the plan that needs no transfer."""

from dataclasses import dataclass
from typing import Any

from sim.policies.instance_plan.base import InstanceGroup, InstancePlan


@dataclass(kw_only=True)
class Colocated(InstancePlan):
    """Prefill and decode of a request run on the same instance."""

    def groups(self, memory: Any, num_instances: int) -> tuple[InstanceGroup, ...]:
        """Each instance is a group of its own."""
        del memory
        return tuple(InstanceGroup((index,), True, True) for index in range(num_instances))
