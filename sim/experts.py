"""Where a plan may place attention and experts, for policies of `parallel_plan` that do."""

from dataclasses import dataclass, field
from enum import Enum
from math import isfinite


class PlanCost(Enum):
    """What a plan's throughput is divided by."""

    gpus = "gpus"
    """Their number."""
    price = "price"
    """Their price, as a multiple of the L20's."""
    power = "power"
    """Their power limit in watts."""


class Loads(Enum):
    """How many tokens each expert of a simulated micro-batch gets."""

    expected = "expected"
    """Its share of all."""
    drawn = "drawn"
    """Drawn by chance from these shares, for every layer anew."""


@dataclass(kw_only=True)
class Experts:
    """Machines to choose from, and how a plan is judged. Only for plans that place experts."""

    attention_nodes: list[str] = field(default_factory=list[str])
    """Nodes whose GPUs may compute attention, by name; empty: the scenario's node or GPU."""
    expert_nodes: list[str] = field(default_factory=list[str])
    """Nodes whose GPUs may hold experts, by name; empty: the same as for attention."""
    plan_cost: PlanCost = PlanCost.gpus
    """What a plan's throughput is divided by, which is what a search maximises."""
    memory_utilization: float = 0.9
    """Share of a GPU's memory that weights and KV may fill (0 to 1)."""
    context_tokens: float | None = None
    """Mean context of a decoding request that the plan is made for; null: the workload's."""
    peaks_reached: bool = False
    """Whether the plan's estimator takes kernels to reach the datasheet's peaks."""
    prefill_here: bool = False
    """Whether prompts are computed by this deployment too; false: by another, so that requests
    come with their KV, as in the paper."""
    loads: Loads = Loads.drawn
    """How many tokens each expert of a micro-batch gets."""
    slots_per_node: int | None = None
    """Experts that a node holds of each layer, replicas included; null: each expert once."""

    def __post_init__(self) -> None:
        if not 0 < self.memory_utilization <= 1:
            raise ValueError(
                f"experts.memory_utilization={self.memory_utilization} must be in (0, 1]; try 0.9"
            )
        tokens = self.context_tokens
        if tokens is not None and not (isfinite(tokens) and tokens >= 1):
            raise ValueError(
                f"experts.context_tokens={tokens} must be at least 1 and finite, or null for the "
                "workload's mean"
            )
        if self.slots_per_node is not None and self.slots_per_node < 1:
            raise ValueError(
                f"experts.slots_per_node={self.slots_per_node} must be at least 1, or null"
            )
        for name in ("attention_nodes", "expert_nodes"):
            names = getattr(self, name)
            if len(set(names)) < len(names):
                raise ValueError(f"experts.{name}={names} names a node twice; name each once")
