"""What the stages of a deployment cost: attention nodes, expert nodes and what is sent between."""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hardware_models.schema import Cluster, Node
from sim.costs.alpha_beta import Hop
from sim.costs.expert_exchange import exchange_s, fullest_ports_s, node_port
from sim.costs.expert_kernels import Tables
from sim.costs.expert_nodes import AttentionNode, ElementTypes, ExpertNode, Reach, one_layer
from sim.costs.link_collectives import LinkCollectives
from sim.costs.seconds import Seconds
from sim.models.architecture import Architecture
from sim.models.work import IterationShape
from sim.policies.parallel_plan.base import Deployment, Part
from sim.state.ping_pong import StageSeconds

Floats = NDArray[np.float64]
Gpus = tuple[str, int]
"""The GPU of a node's part, and how many of them."""


class DeploymentCosts:
    """A `PlanEstimator` from datasheets; also what the simulation itself asks."""

    def __init__(
        self, architecture: Architecture, nodes: Mapping[str, Node], types: ElementTypes, *,
        ideal: bool = False, tables: Tables | None = None,
    ) -> None:  # fmt: skip
        """Take over a model and the machines that a plan may use.

        Args:
            architecture: with experts in every layer.
            nodes: by the name of their GPU.
            types: of weights, activations and KV.
            ideal: see `Reach`.
            tables: see `Reach`.

        Raises:
            ValueError: the model has layers without experts.
        """
        one_layer(architecture)  # refuses what no node could be made of
        self.architecture, self._nodes, self.types = architecture, nodes, types
        self.ideal, self.tables = ideal, tables
        self.token_bytes = architecture.hidden_size * types.dtype_bytes
        """Of one row that is sent to an expert, or comes back."""
        # A search asks the same again and again; a node is the same whatever its number of copies.
        self.attention_node = lru_cache(maxsize=None)(self._attention_node)
        self.expert_node = lru_cache(maxsize=None)(self._expert_node)
        self.port = lru_cache(maxsize=None)(self._port)
        self._all_to_all = lru_cache(maxsize=None)(self._collectives)
        self._attention_s = lru_cache(maxsize=None)(self._decoding_s)
        self._expert_s = lru_cache(maxsize=None)(self._even_s)
        self._hit_s = lru_cache(maxsize=None)(self._total_s)

    def stages(
        self, deployment: Deployment, node_tokens: int, context_tokens: float
    ) -> StageSeconds:
        """See `PlanEstimator`; every expert gets as many rows as another."""
        attention, experts, _ = deployment
        attention_s = self._attention_s(
            attention[:2], experts is not None, node_tokens, node_tokens * context_tokens
        )
        a = self.architecture
        rows = node_tokens * attention.num_nodes * a.experts_per_token / a.num_experts
        part = expert_part(deployment, a.num_experts)
        each = a.num_experts // part.num_nodes
        if experts is None:
            payload = node_tokens * a.experts_per_token * self.token_bytes / attention.tp_size
            expert_s = self._expert_s(part[:2], False, rows, each)
            return StageSeconds(attention_s, expert_s, self._all_to_all_s(attention, payload))
        sent = rows * each / attention.num_nodes * self.token_bytes
        matrix = np.full((attention.num_nodes, experts.num_nodes), sent)
        expert_s = self._expert_s(experts[:2], True, rows, each)
        return StageSeconds(attention_s, expert_s, self.exchange_s(deployment, matrix))

    def sources(self, deployment: Deployment, node_tokens: int, context_tokens: float) -> Seconds:
        """Of a micro-batch in one layer on all stations, split by what it rests on."""
        attention, experts, _ = deployment
        a, apart = self.architecture, experts is not None
        context = node_tokens * context_tokens
        node = self.attention_node(attention[:2], apart)
        rows = node_tokens * attention.num_nodes * a.experts_per_token / a.num_experts
        part = expert_part(deployment, a.num_experts)
        each = [rows] * (a.num_experts // part.num_nodes)
        transfer_s = self.stages(deployment, node_tokens, context_tokens).transfer_s
        return (
            node.layer(decodes(node_tokens, context))
            .plus(self.expert_node(part[:2], apart).layer(each))
            .plus(Seconds(datasheet=2 * float(transfer_s)))
        )

    def outside_s(self, deployment: Deployment, node_tokens: int) -> float:
        """See `PlanEstimator`."""
        return self.attention_node(
            deployment.attention[:2], deployment.experts is not None
        ).outside_s(node_tokens, node_tokens)

    def exchange_s(self, deployment: Deployment, sent_bytes: ArrayLike) -> float:
        """Seconds of one exchange from attention nodes (rows) to expert nodes (columns)."""
        assert deployment.experts is not None
        return exchange_s(sent_bytes, *self.ports(deployment))

    def loaded_s(
        self, deployment: Deployment, rows: Floats, most_tokens: int, tokens: int
    ) -> tuple[Floats, Floats]:
        """Seconds of the slowest expert node, and of one way to the experts, in every layer.

        Args:
            deployment: where everything lies.
            rows: of each physical expert [layers, slots], node by node.
            most_tokens: of the micro-batch on the fullest attention node.
            tokens: of the micro-batch on all of them.
        """
        attention, experts, _ = deployment
        part = expert_part(deployment, self.architecture.num_experts)
        by_node = rows.reshape(len(rows), part.num_nodes, -1)
        node_rows, hit = by_node.sum(axis=2), (by_node > 0).sum(axis=2)
        gpus, apart = part[:2], experts is not None
        expert_s = np.array(
            [max(self._hit_s(gpus, apart, *one) for one in zip(*layer, strict=True))
             for layer in zip(node_rows.tolist(), hit.tolist(), strict=True)]
        )  # fmt: skip
        received = node_rows.max(axis=1) * self.token_bytes
        if experts is None:
            sent = tokens * self.architecture.experts_per_token * self.token_bytes
            even = sent / attention.num_gpus
            return expert_s, np.array(
                [self._all_to_all_s(attention, max(even, one / part.tp_size)) for one in received]
            )
        sent = most_tokens * self.architecture.experts_per_token * self.token_bytes
        way_s = fullest_ports_s(sent, received, *self.ports(deployment))
        return expert_s, (way_s if tokens else np.zeros(len(rows)))

    def ports(self, deployment: Deployment) -> tuple[Hop, Hop]:
        """Of an attention node and of an expert node."""
        assert deployment.experts is not None
        return self.port(deployment.attention[:2]), self.port(deployment.experts[:2])

    def _all_to_all_s(self, part: Part, payload_bytes: float) -> float:
        """Seconds of an all-to-all in which the fullest GPU sends, or gets, so many bytes."""
        per_node = min(self._nodes[part.gpu].num_gpus, part.num_gpus)
        num_nodes, rest = divmod(part.num_gpus, per_node)
        if rest:
            raise ValueError(
                f"{part.num_gpus} GPUs with attention and experts do not fill nodes of {per_node} "
                f"{part.gpu}; take a multiple of {per_node} for policy.parallel_plan.num_gpus"
            )
        links = self._all_to_all(part.gpu, num_nodes)
        return links.seconds("all_to_all", part.num_gpus, payload_bytes, num_nodes).seconds

    def _decoding_s(self, gpus: Gpus, fused: bool, tokens: int, context: float) -> float:
        return self.attention_node(gpus, fused).layer_s(decodes(tokens, context))

    def _even_s(self, gpus: Gpus, fused: bool, rows: float, each: int) -> float:
        return self.expert_node(gpus, fused).layer_s([rows] * each)

    def _total_s(self, gpus: Gpus, fused: bool, rows: float, hit: int) -> float:
        return self.expert_node(gpus, fused).layer_s([rows / hit] * hit) if hit else 0.0

    def _attention_node(self, gpus: Gpus, fused: bool) -> AttentionNode:
        node, reach = self._nodes[gpus[0]], Reach(self.ideal, fused, self.tables)
        return AttentionNode(self.architecture, node, gpus[1], self.types, reach)

    def _expert_node(self, gpus: Gpus, fused: bool) -> ExpertNode:
        node, reach = self._nodes[gpus[0]], Reach(self.ideal, fused, self.tables)
        return ExpertNode(self.architecture, node, gpus[1], self.types, reach)

    def _port(self, gpus: Gpus) -> Hop:
        return node_port(self._nodes[gpus[0]], gpus[1])

    def _collectives(self, gpu: str, num_nodes: int) -> LinkCollectives:
        node = self._nodes[gpu]
        if num_nodes == 1:
            return LinkCollectives(node)
        name = f"{node.name}_by_{num_nodes}"
        return LinkCollectives(
            Cluster(name=name, node=node, num_nodes=num_nodes, source="as the plan asks")
        )


def expert_part(deployment: Deployment, num_experts: int) -> Part:
    """The nodes that hold experts: those of a deployment, or else groups of attention's GPUs.

    Beside attention every GPU is a node of experts; where there are more GPUs than experts, so many
    of them share each one.
    """
    attention, experts, _ = deployment
    if experts is not None:
        return experts
    groups = min(attention.num_gpus, num_experts)
    return Part(attention.gpu, attention.num_gpus // groups, groups)


def decodes(tokens: int, context: float) -> IterationShape:
    """A micro-batch of decodes that read so much context in all."""
    return IterationShape(0, 0, 0, 0, tokens, int(context), tokens)
