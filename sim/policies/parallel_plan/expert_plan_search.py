"""Searches the deployment with most tokens per cost (MegaScale-Infer, section 4.2, Algorithm 1).

For every pair of GPU types and of tensor-parallel sizes the number of attention nodes follows from
balance, T_a = T_e; for every number of micro-batches the batch is the largest that the memory and
the SLO allow. The paper's balance takes both times to grow linearly with the batch. Where reading
weights takes longer than computing they do not, so balance is also sought where the SLO or the
memory ends the batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from sim.policies.parallel_plan._largest_batch import (
    MOST_NODE_TOKENS,
    Shortfall,
    best,
    fitting_tokens,
    largest,
    largest_batch,
)
from sim.policies.parallel_plan.base import (
    Deployment,
    GpuType,
    ParallelPlan,
    Part,
    Plan,
    PlanView,
)
from sim.state.ping_pong import MOST_MICRO_BATCHES, StageSeconds

PROFILED = (32, 64, 128, 256, 512)
"""Requests of a micro-batch at which both kinds of node are profiled."""


@dataclass(kw_only=True)
class ExpertPlanSearch(ParallelPlan):
    """One expert a node, as many attention nodes as keep the experts busy."""

    attention_tp: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    """Sizes of an attention node to try."""
    expert_tp: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    """Sizes of an expert node to try."""
    num_micro_batches: list[int] = field(default_factory=lambda: [3, MOST_MICRO_BATCHES])
    """Numbers to try."""
    num_attention_nodes: list[int] = field(default_factory=list[int])
    """Numbers to try; empty: those that balance attention and experts."""
    most_attention_nodes: int = 64
    """Where balance asks for more, so many."""

    def __post_init__(self) -> None:
        for name in ("attention_tp", "expert_tp", "num_micro_batches"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise ValueError(
                    f"policy.parallel_plan.{name}={values} must name numbers of at least 1"
                )
        if self.num_attention_nodes and min(self.num_attention_nodes) < 1:
            raise ValueError(
                f"policy.parallel_plan.num_attention_nodes={self.num_attention_nodes} must be at "
                "least 1 each, or empty for the number that balances"
            )
        if self.most_attention_nodes < 1:
            raise ValueError(
                f"policy.parallel_plan.most_attention_nodes={self.most_attention_nodes} must be "
                "at least 1"
            )

    def plan(self, view: PlanView) -> Plan:
        """The best of all."""
        _require_a_size("attention_tp", self.attention_tp, view.attention)
        _require_a_size("expert_tp", self.expert_tp, view.experts)
        return best(self.tried(view), "policy/parallel_plan=expert_plan_search")

    def tried(self, view: PlanView) -> Iterator[Plan | Shortfall]:
        """Every deployment of the search at its largest batch, or what it lacks."""
        for attention in view.attention:
            for experts in view.experts:
                for attention_tp in self.attention_tp:
                    for expert_tp in self.expert_tp:
                        sizes = (attention_tp, expert_tp)
                        if attention_tp in attention.tp_sizes and expert_tp in experts.tp_sizes:
                            yield from self._of_sizes(view, attention, experts, sizes)

    def _of_sizes(
        self, view: PlanView, attention: GpuType, experts: GpuType, sizes: tuple[int, int]
    ) -> Iterator[Plan | Shortfall]:
        expert_part = Part(experts.name, sizes[1], view.model.num_experts)
        for micro_batches in self.num_micro_batches:
            one = Deployment(Part(attention.name, sizes[0], 1), expert_part, micro_batches)
            for count in self.num_attention_nodes or self._balanced(view, one):
                part = one.attention._replace(num_nodes=count)
                yield largest_batch(view, one._replace(attention=part))

    def _balanced(self, view: PlanView, one: Deployment) -> list[int]:
        """Numbers of attention nodes that keep both sides busy, as near as whole numbers come."""
        found = {balanced_nodes(view, one), *nodes_at_bound(view, one)}
        return sorted({min(max(count, 1), self.most_attention_nodes) for count in found})


def _require_a_size(key: str, sizes: list[int], gpus: tuple[GpuType, ...]) -> None:
    """Refuse sizes none of which can be tried.

    Raises:
        ValueError: says which can.
    """
    fitting = sorted({size for gpu in gpus for size in gpu.tp_sizes})
    if not set(sizes) & set(fitting):
        raise ValueError(
            f"policy.parallel_plan.{key}={sizes} must name a size into which the model and a node "
            f"divide; there are: {', '.join(map(str, fitting)) or 'none'}"
        )


def balanced_nodes(view: PlanView, deployment: Deployment) -> int:
    """Attention nodes at which attention and experts take as long: n_a = k1 E / (k3 K).

    k1 and k3 are what one more request adds to T_a on an attention node and one more row to T_e on
    an expert node, over a profile of both.

    Args:
        view: of the search.
        deployment: with one attention node, so that an expert gets K / E rows for its every token.
    """
    model = view.model
    rows = model.experts_per_token / model.num_experts
    attention_s: list[float] = []
    expert_s: list[float] = []
    scale = round(1 / rows)
    for tokens in PROFILED:
        stages = view.estimator.stages(deployment, tokens, view.context_tokens)
        attention_s.append(stages.attention_s)
        # So many tokens give an expert as many rows as there are requests on the node above.
        expert_s.append(
            view.estimator.stages(deployment, tokens * scale, view.context_tokens).expert_s
        )
    k1 = _slope(PROFILED, attention_s)
    k3 = _slope([tokens * scale * rows for tokens in PROFILED], expert_s)
    return max(round(k1 / (k3 * rows)), 1) if k3 > 0 else 1


def nodes_at_bound(view: PlanView, deployment: Deployment) -> set[int]:
    """Attention nodes with which the experts are as busy where the SLO or the memory binds.

    Args:
        view: of the search.
        deployment: with one attention node.
    """
    model, count = view.model, deployment.num_micro_batches
    turn_s = view.slo_tpot_s / (count * model.num_layers)
    room = fitting_tokens(view, deployment)

    def stages(tokens: int) -> StageSeconds:
        return view.estimator.stages(deployment, tokens, view.context_tokens)

    node_tokens = largest(room, lambda tokens: stages(tokens).attention_s <= turn_s)
    if node_tokens < 1:
        return set()
    found: set[int] = set()
    for limit_s in {stages(node_tokens).attention_s, min(turn_s, 1.0)}:
        tokens = largest(MOST_NODE_TOKENS, lambda one, limit_s=limit_s: (
            stages(one).expert_s <= limit_s
        ))  # fmt: skip
        found |= {tokens // node_tokens, -(-tokens // node_tokens)}
    return found


def _slope(at: "tuple[int, ...] | list[float]", seconds: list[float]) -> float:
    """Of the line with the least squares."""
    mean_at, mean_s = sum(at) / len(at), sum(seconds) / len(seconds)
    spread = sum((one - mean_at) ** 2 for one in at)
    return sum((a - mean_at) * (s - mean_s) for a, s in zip(at, seconds, strict=True)) / spread
