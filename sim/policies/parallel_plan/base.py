"""Parallel plan: on which GPUs attention and experts of one replica lie, and how many of each.

MegaScale-Infer (arXiv 2504.02263), section 4.2: attention nodes keep KV and are copies of each
other, every expert node has experts of its own, and either kind splits its part among its GPUs.
"""

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

from sim.policies.base import Policy
from sim.state.ping_pong import StageSeconds


class GpuType(NamedTuple):
    """A kind of GPU that a plan may use."""

    name: str
    memory_bytes: float
    """That an engine may fill."""
    cost: float
    """Of one GPU, in any unit that all share: a price, or watts."""
    tp_sizes: tuple[int, ...]
    """How many of one node may share a part."""


class ModelSizes(NamedTuple):
    """What a plan needs to know of a model."""

    num_layers: int
    num_experts: int
    experts_per_token: int
    attention_bytes: float
    """Weights of everything but the experts."""
    expert_bytes: float
    """Weights of one expert in all layers."""
    kv_bytes_per_token: float


class Part(NamedTuple):
    """Nodes of one kind, alike."""

    gpu: str
    tp_size: int
    """GPUs of a node that share its part."""
    num_nodes: int

    @property
    def num_gpus(self) -> int:
        """Of all nodes."""
        return self.tp_size * self.num_nodes


class Deployment(NamedTuple):
    """Where a replica's attention and experts lie, and in how many parts a batch goes round."""

    attention: Part
    experts: Part | None
    """None: experts lie on the attention nodes' GPUs, spread over all of them."""
    num_micro_batches: int


class PlanEstimator(Protocol):
    """Seconds of one micro-batch in one layer, as an engine would profile them."""

    def stages(
        self, deployment: Deployment, node_tokens: int, context_tokens: float
    ) -> StageSeconds:
        """Of a deployment.

        Args:
            deployment: where everything lies.
            node_tokens: requests of the micro-batch on one attention node, each with one token.
            context_tokens: of each.
        """
        ...

    def outside_s(self, deployment: Deployment, node_tokens: int) -> float:
        """Embedding, lm_head and sampling of a micro-batch."""
        ...


class PlanView(NamedTuple):
    """What a plan is made from. Read only."""

    model: ModelSizes
    attention: tuple[GpuType, ...]
    """Kinds of GPU for attention."""
    experts: tuple[GpuType, ...]
    """Kinds of GPU for experts."""
    context_tokens: float
    """Mean context of a request."""
    slo_tpot_s: float
    """Longest time of an iteration; infinite for none."""
    estimator: PlanEstimator


class Plan(NamedTuple):
    """A deployment with what it is expected to do at its largest batch."""

    deployment: Deployment
    batch: int
    """Requests that decode at once, on all attention nodes."""
    stages: StageSeconds
    iteration_s: float
    cost: float
    """Of all GPUs, in the view's unit."""
    bound: str
    """What keeps the batch from being larger: `slo` or `memory`."""

    @property
    def tokens_per_s(self) -> float:
        """Of the whole deployment."""
        return self.batch / self.iteration_s

    @property
    def num_gpus(self) -> int:
        """Of both kinds."""
        attention, experts, _ = self.deployment
        return attention.num_gpus + (experts.num_gpus if experts else 0)

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Throughput over GPUs."""
        return self.tokens_per_s / self.num_gpus

    @property
    def tokens_per_s_per_cost(self) -> float:
        """Throughput over cost: what a search maximises."""
        return self.tokens_per_s / self.cost


@dataclass(kw_only=True)
class ParallelPlan(Policy):
    """Decides once, before anything is served."""

    places_experts: ClassVar[bool] = True
    """Whether experts have places of their own; false: as `tp_size` and `pp_size` say."""

    @abstractmethod
    def plan(self, view: PlanView) -> Plan:
        """The plan.

        Raises:
            ValueError: none fits; says which bound binds, and by how much.
        """


def known_gpu(wanted: str | None, choices: Iterable[GpuType], key: str) -> GpuType:
    """The kind of GPU that a rule names in a field; None: the first.

    Raises:
        ValueError: it is none of those that there are.
    """
    there = {one.name: one for one in choices}
    if wanted is None:
        return next(iter(there.values()))
    if wanted not in there:
        raise ValueError(
            f"policy.parallel_plan.{key}={wanted} is none of the GPUs to choose from: "
            f"{', '.join(there)}; name one of these, or its node in experts.attention_nodes or "
            "experts.expert_nodes"
        )
    return there[wanted]


def require_size(key: str, size: int, gpu: GpuType) -> None:
    """Refuse a size into which the model or a node does not divide.

    Raises:
        ValueError: says which sizes there are.
    """
    if size not in gpu.tp_sizes:
        there = ", ".join(map(str, gpu.tp_sizes))
        raise ValueError(
            f"policy.parallel_plan.{key}={size} must be one of {there}, "
            f"into which the model and a node of {gpu.name} divide"
        )
