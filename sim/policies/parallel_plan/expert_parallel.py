"""Experts spread over the GPUs that compute attention: expert parallelism in one place.

The baseline of MegaScale-Infer: attention is data parallel, experts receive tokens by all-to-all,
and nothing overlaps.
"""

from dataclasses import dataclass

from sim.policies.parallel_plan._largest_batch import best, largest_batch
from sim.policies.parallel_plan.base import (
    Deployment,
    ParallelPlan,
    Part,
    Plan,
    PlanView,
    known_gpu,
    require_size,
)


@dataclass(kw_only=True)
class ExpertParallel(ParallelPlan):
    """Every GPU has its share of the experts, and with its neighbours a copy of attention."""

    num_gpus: int = 8
    """In all."""
    attention_tp: int = 8
    """Of these, how many share one copy of attention."""
    gpu: str | None = None
    """Of those to choose from for attention; null: the first."""

    def __post_init__(self) -> None:
        for name in ("num_gpus", "attention_tp"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"policy.parallel_plan.{name}={getattr(self, name)} must be at least 1"
                )
        if self.num_gpus % self.attention_tp:
            raise ValueError(
                f"policy.parallel_plan.num_gpus={self.num_gpus} must be a multiple of "
                f"attention_tp={self.attention_tp}; change one"
            )

    def plan(self, view: PlanView) -> Plan:
        """The deployment itself, at its largest batch."""
        gpu = known_gpu(self.gpu, view.attention, "gpu")
        many, few = (
            max(self.num_gpus, view.model.num_experts),
            min(self.num_gpus, view.model.num_experts),
        )
        if many % few:
            raise ValueError(
                f"policy.parallel_plan.num_gpus={self.num_gpus} must divide num_experts="
                f"{view.model.num_experts} or be a multiple of it, so that every GPU has as much"
            )
        require_size("attention_tp", self.attention_tp, gpu)
        part = Part(gpu.name, self.attention_tp, self.num_gpus // self.attention_tp)
        found = largest_batch(view, Deployment(part, None, 1))
        return best([found], "policy/parallel_plan=expert_parallel")
