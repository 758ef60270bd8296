"""Seconds of one layer on an attention node and on an expert node, each with GPUs of its own.

MegaScale-Infer (arXiv 2504.02263), section 4.2 and table 2: the products of either kind of node,
reading KV, and what the GPUs of a node exchange among themselves.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import NamedTuple

from hardware_models.schema import Gpu, Node
from sim.costs.expert_kernels import DatasheetKernels, NodeKernels, TableKernels, Tables
from sim.costs.kernel_model import KernelModel
from sim.costs.link_collectives import LinkCollectives
from sim.costs.roofline import RooflineKernels
from sim.costs.seconds import NOTHING, Seconds
from sim.models.architecture import Architecture
from sim.models.operators import layer_linears
from sim.models.parallel import tensor_part
from sim.models.work import IterationShape

ATTENTION_ELEMENTWISE = 4
"""Two norms with their additions, the rotation and the write to the cache."""


class ElementTypes(NamedTuple):
    """What weights, activations and KV are stored as."""

    dtype: str
    dtype_bytes: int
    kv_dtype_bytes: int
    kv_dtype: str = "bf16"


class Reach(NamedTuple):
    """How good the kernels and their libraries are."""

    ideal: bool = False
    """Every kernel reaches the peaks, and the GPUs of a node exchange what they do at no cost."""
    fused: bool = True
    """Exchanges inside a node happen behind the products that they feed or follow, as with Flux
    (arXiv 2406.06858), which MegaScale-Infer uses; false: before and after them."""
    tables: Tables | None = None
    """Whose measured kernels are taken; None: the datasheet's roofline."""


def one_layer(architecture: Architecture) -> Architecture:
    """A model of one layer with experts, which all of its layers must have.

    Raises:
        ValueError: layers without experts, or an expert that every token takes.
    """
    a = architecture
    if a.num_dense_layers or not a.num_experts:
        raise ValueError(
            f"model {a.name} has {a.num_dense_layers} layers without experts; a plan that places "
            "experts is for models with experts in every layer, such as mixtral_8x22b or dbrx"
        )
    if a.shared_expert_intermediate_size:
        raise ValueError(
            f"model {a.name} has an expert that every token takes "
            f"(shared_expert_intermediate_size={a.shared_expert_intermediate_size}), which has no "
            "place in a plan that places experts; take a model without"
        )
    return replace(a, num_layers=1, sparse_layers=(0,))


class _NodeGpus:
    """The GPUs of one node that share a part of a model."""

    def __init__(
        self, architecture: Architecture, node: Node, tp_size: int, types: ElementTypes,
        reach: Reach,
    ) -> None:  # fmt: skip
        gpu = _gpu_of(node)
        rank = tensor_part(one_layer(architecture), tp_size)
        bytes_per_s = gpu.peak.memory_bandwidth_bytes_per_s
        model = KernelModel.of(gpu, bytes_per_s, types.dtype)
        if reach.ideal:
            model = KernelModel.ideal(model.flops_per_s, bytes_per_s)
        self._reach, self.rank = reach, rank
        self.roofline = RooflineKernels(
            rank, model, dtype_bytes=types.dtype_bytes, kv_dtype_bytes=types.kv_dtype_bytes
        )
        self.kernels: NodeKernels = DatasheetKernels(self.roofline)
        if reach.tables is not None and not reach.ideal:
            names = (types.dtype, types.kv_dtype)
            self.kernels = TableKernels(self.roofline, gpu, reach.tables, names, tp_size)
        self.hidden_bytes = architecture.hidden_size * types.dtype_bytes
        self.tp_size = tp_size
        self._linears = {one.name: one for one in layer_linears(rank)}
        self._collectives = LinkCollectives(node)

    def product(self, name: str, rows: float, groups: float = 1.0) -> Seconds:
        """A matrix product of the layer, or several in one launch.

        Args:
            name: of the matrix.
            rows: of each product.
            groups: experts that are hit.
        """
        return self.kernels.product(self._linears[name], rows, groups)

    def elementwise(self, elements: float, count: int = 1) -> Seconds:
        """Kernels that touch so many elements each."""
        if self._reach.ideal:
            return NOTHING
        num_bytes = elements * self.roofline.dtype_bytes
        return Seconds(datasheet=count * self.roofline.model.elementwise_s(num_bytes))

    def exchange_s(self, operation: str, rows: float) -> float:
        """Seconds in which the node's GPUs add up, gather or scatter hidden states."""
        if self.tp_size == 1 or not rows or self._reach.ideal:
            return 0.0
        payload = rows * self.hidden_bytes
        return self._collectives.seconds(operation, self.tp_size, payload).seconds

    def fused(self, operation: str, rows: float, product: Seconds) -> Seconds:
        """A product and the exchange before or after it, one behind the other where fused."""
        exchange = Seconds(datasheet=self.exchange_s(operation, rows))
        if self._reach.fused:
            return max(product, exchange, key=lambda one: one.total)
        return product.plus(exchange)


class AttentionNode:
    """Attention, router and the adding up of what experts return."""

    def __init__(
        self, architecture: Architecture, node: Node, tp_size: int, types: ElementTypes,
        reach: Reach = Reach(),  # noqa: B008  it is immutable
    ) -> None:  # fmt: skip
        """Take over the model and the first `tp_size` GPUs of a node.

        Args:
            architecture: with experts in every layer.
            node: whose GPUs they are.
            tp_size: GPUs that share the part.
            types: of weights, activations and KV.
            reach: how good kernels are.

        Raises:
            ValueError: the model has layers without experts, or does not divide.
        """
        self._gpus = _NodeGpus(architecture, node, tp_size, types, reach)
        self._top_k = architecture.experts_per_token

    def layer_s(self, shape: IterationShape) -> float:
        """Seconds of one layer for a micro-batch."""
        return self.layer(shape).total

    def layer(self, shape: IterationShape) -> Seconds:
        """The same, split by what it rests on."""
        tokens, gpus, a = shape.tokens, self._gpus, self._gpus.rank
        if not tokens:
            return NOTHING
        moved = tokens * (8 * a.hidden_size + 2 * (a.query_size + 2 * a.kv_size))
        parts = (
            gpus.fused("all_gather", tokens, gpus.product("qkv_projection", tokens)),
            gpus.kernels.attention(shape),
            gpus.fused("reduce_scatter", tokens, gpus.product("output_projection", tokens)),
            gpus.product("router", tokens),
            gpus.elementwise(moved / ATTENTION_ELEMENTWISE, ATTENTION_ELEMENTWISE),
            gpus.elementwise((self._top_k + 1) * tokens * a.hidden_size),
        )
        return reduce(Seconds.plus, parts)

    def outside_s(self, tokens: int, sampled: int) -> float:
        """Seconds of embedding, lm_head and sampling."""
        if not sampled:
            return 0.0
        gpus = self._gpus
        embedding = gpus.elementwise(2 * tokens * gpus.rank.hidden_size)
        return embedding.plus(gpus.kernels.sampled(sampled)).total


class ExpertNode:
    """The experts of a node: two products with a gate between them."""

    def __init__(
        self, architecture: Architecture, node: Node, tp_size: int, types: ElementTypes,
        reach: Reach = Reach(),  # noqa: B008  it is immutable
    ) -> None:  # fmt: skip
        """As `AttentionNode`."""
        self._gpus = _NodeGpus(architecture, node, tp_size, types, reach)

    def layer_s(self, rows: Sequence[float]) -> float:
        """Seconds of one layer for a micro-batch.

        The gate is the first product's epilogue. With several GPUs a node, each receives a share of
        every row and they gather them; sums are scattered in the same shares.

        Args:
            rows: that each of the node's experts got.
        """
        return self.layer(rows).total

    def layer(self, rows: Sequence[float]) -> Seconds:
        """The same, split by what it rests on."""
        hit = [one for one in rows if one > 0]
        if not hit:
            return NOTHING
        total, groups = sum(hit), len(hit)
        gpus = self._gpus
        into = gpus.product("expert_gate_up", total / groups, groups)
        out = gpus.product("expert_down", total / groups, groups)
        gathered = gpus.fused("all_gather", total, into)
        return gathered.plus(gpus.fused("reduce_scatter", total, out))


def _gpu_of(node: Node) -> Gpu:
    if node.gpu is None:
        raise ValueError(f"node {node.name} has no GPU, and experts are placed on GPUs; name one")
    return node.gpu
