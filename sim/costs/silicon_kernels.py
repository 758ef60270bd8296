"""The kernels of a model from NVIDIA's measured tables (see `sim.costs.silicon`)."""

from collections.abc import Sequence
from dataclasses import replace
from math import log

import numpy as np
from numpy.typing import NDArray

from sim.costs.curve import Curve
from sim.costs.kernel_model import KernelModel
from sim.costs.measured_attention import MeasuredAttention
from sim.costs.measured_experts import MeasuredExperts, measured_experts
from sim.costs.measured_products import MeasuredProducts
from sim.costs.roofline import RooflineKernels
from sim.costs.seconds import Seconds
from sim.costs.silicon import Silicon, fastest, table_dtype
from sim.models.architecture import Architecture
from sim.models.operators import layer_linears, lm_head
from sim.models.work import IterationShape

Rows = NDArray[np.float64]


class SiliconKernels:
    """Products, experts and attention as measured; norms, activations and sampling by datasheet."""

    def __init__(
        self, tables: Silicon, roofline: RooflineKernels, *,
        dtype: str, kv_dtype: str, tp_size: int = 1,
    ) -> None:  # fmt: skip
        """Read what the model needs.

        Args:
            tables: of the GPU.
            roofline: of what one rank holds, on the GPU of the tables.
            dtype: our name of the type of weights and activations.
            kv_dtype: our name of the type of the KV cache.
            tp_size: ranks that share the model: the tables of experts are by rank count.

        Raises:
            ValueError: the tables lack the type or the operator; says what there is.
        """
        architecture, model = roofline.architecture, roofline.model
        self.architecture, self.roofline = architecture, roofline
        measured_type = table_dtype(dtype, "model.dtype")
        decodes, heads = _attention_rows(tables, architecture, kv_dtype, "generation")
        prompts, _ = _attention_rows(tables, heads or architecture, kv_dtype, "context")
        floor = _memory_bytes_per_s(decodes, heads or architecture, model, roofline.kv_dtype_bytes)
        self.attention = MeasuredAttention(
            prompts, decodes, self.roofline, floor_bytes_per_s=floor, measured_as=heads
        )
        products = fastest(tables.rows("gemm", "gemm", gemm_dtype=measured_type), ("n", "k", "m"))
        plain = [one for one in layer_linears(architecture) if one.copies == 1]
        self._plain = plain
        shapes = {(one.outputs, one.inputs) for one in (*plain, lm_head(architecture))}
        self.products = MeasuredProducts(
            products, shapes, model, dtype_bytes=roofline.dtype_bytes, floor_bytes_per_s=floor
        )
        self.experts: MeasuredExperts | None = None
        if architecture.sparse_layers:
            self.experts = measured_experts(tables, self.roofline, measured_type, tp_size)

    def tokens(self, tokens: int) -> Seconds:
        """Products and experts as measured, the rest by datasheet."""
        if not tokens:
            return Seconds()
        seconds = Seconds(datasheet=self.roofline.elementwise_s(tokens))
        for linear in self._plain:
            one = self.products.product(linear.outputs, linear.inputs, tokens)
            seconds = seconds.plus(one.times(linear.layers))
        return seconds.plus(self.experts.tokens(tokens)) if self.experts else seconds

    def sampled(self, positions: int) -> Seconds:
        """The lm_head as measured, sampling by datasheet."""
        if not positions:
            return Seconds()
        head = lm_head(self.architecture)
        return self.products.product(head.outputs, head.inputs, positions).plus(
            Seconds(datasheet=self.roofline.sampling_s(positions))
        )

    def prompt_attention(self, shape: IterationShape) -> Seconds:
        """Attention of an iteration with chunks."""
        return self.attention.prompt_attention(shape)

    def decode_attention(self, num_decodes: int) -> Curve:
        """Attention of decoding requests by the tokens that they read."""
        return self.attention.decode_attention(num_decodes)

    def decode_source(self, num_decodes: int, context: float) -> Seconds:
        """One point of it, split by what it rests on."""
        return self.attention.decode_source(num_decodes, context)


def _attention_rows(
    tables: Silicon, architecture: Architecture, kv_dtype: str, phase: str
) -> tuple[Rows, Architecture | None]:
    """Rows of (batch, length, seconds), and the heads that they are of where not the model's."""
    a = architecture
    columns = tables.rows(
        "attention", f"{phase}_attention",
        kv_cache_dtype=table_dtype(kv_dtype, "model.kv_dtype"), head_dim=a.head_dim, window_size=0,
    )  # fmt: skip
    known = sorted(
        {*zip(columns["num_heads"].tolist(), columns["num_key_value_heads"].tolist(), strict=True)}
    )
    if not known:
        raise ValueError(
            f"attention with head_dim={a.head_dim} and model.kv_dtype={kv_dtype} was not measured "
            f"for {tables.framework} on {tables.gpu}; take another framework or cost=roofline"
        )
    heads = min(known, key=lambda pair: _distance(pair, (a.num_heads, a.num_kv_heads)))
    keep = (columns["num_heads"] == heads[0]) & (columns["num_key_value_heads"] == heads[1])
    kept = {name: values[keep] for name, values in columns.items()}
    kept["length"] = kept["isl"] + (kept["step"] if phase == "generation" else 0)
    rows = fastest(kept, ("batch_size", "length"))
    if heads == (a.num_heads, a.num_kv_heads):
        return rows, None
    return rows, replace(a, num_heads=heads[0], num_kv_heads=heads[1])


def _distance(one: Sequence[int], other: Sequence[int]) -> tuple[float, Sequence[int]]:
    return sum(abs(log(a / b)) for a, b in zip(one, other, strict=True)), one


def _memory_bytes_per_s(
    decodes: Rows, heads: Architecture, model: KernelModel, kv_dtype_bytes: int
) -> float:
    """What the memory delivered to contexts that no cache holds; by datasheet where none is."""
    batch, length, seconds = decodes.T
    read_bytes = 2 * heads.kv_size * kv_dtype_bytes * batch * length
    large = read_bytes > 2 * max(model.l2_bytes, 1.0)
    if not large.any():
        return model.bytes_per_s * model.memory_share
    return float(np.max(read_bytes[large] / seconds[large]))
