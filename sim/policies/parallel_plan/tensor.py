"""Every rank has a slice of every layer, experts included: as vLLM without expert parallelism."""

from dataclasses import dataclass
from typing import ClassVar, NoReturn

from sim.policies.parallel_plan.base import ParallelPlan, PlanView


@dataclass(kw_only=True)
class Tensor(ParallelPlan):
    """The scenario's `tp_size` and `pp_size`, and nothing else to decide."""

    places_experts: ClassVar[bool] = False

    def plan(self, view: PlanView) -> NoReturn:
        """There is none to make."""
        del view
        raise ValueError("policy/parallel_plan=tensor places no experts; tp_size and pp_size do")
