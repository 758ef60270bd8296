"""Attention and experts on nodes of their own, in numbers that are given."""

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
class Disaggregated(ParallelPlan):
    """Sizes as given; the batch is the largest that they allow."""

    attention_tp: int = 8
    """GPUs of an attention node."""
    num_attention_nodes: int = 1
    """Copies of attention, each with the KV of its own requests."""
    expert_tp: int = 8
    """GPUs of an expert node."""
    num_expert_nodes: int | None = None
    """Nodes that the experts are spread over evenly; null: one an expert."""
    num_micro_batches: int = 3
    """In which a batch goes round, where policy/micro_batching=ping_pong names no number."""
    attention_gpu: str | None = None
    """Of those to choose from; null: the first."""
    expert_gpu: str | None = None
    """Of those to choose from; null: the first."""

    def __post_init__(self) -> None:
        for name in ("attention_tp", "num_attention_nodes", "expert_tp", "num_micro_batches"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"policy.parallel_plan.{name}={getattr(self, name)} must be at least 1"
                )
        if self.num_expert_nodes is not None and self.num_expert_nodes < 1:
            raise ValueError(
                f"policy.parallel_plan.num_expert_nodes={self.num_expert_nodes} must be at least "
                "1, or null for one an expert"
            )

    def plan(self, view: PlanView) -> Plan:
        """The deployment itself, at its largest batch."""
        attention = known_gpu(self.attention_gpu, view.attention, "attention_gpu")
        experts = known_gpu(self.expert_gpu, view.experts, "expert_gpu")
        require_size("attention_tp", self.attention_tp, attention)
        require_size("expert_tp", self.expert_tp, experts)
        nodes = self.num_expert_nodes or view.model.num_experts
        if view.model.num_experts % nodes:
            raise ValueError(
                f"policy.parallel_plan.num_expert_nodes={nodes} must divide "
                f"num_experts={view.model.num_experts}; take another number, or null for one an "
                "expert"
            )
        deployment = Deployment(
            Part(attention.name, self.attention_tp, self.num_attention_nodes),
            Part(experts.name, self.expert_tp, nodes),
            self.num_micro_batches,
        )
        return best([largest_batch(view, deployment)], "policy/parallel_plan=disaggregated")
