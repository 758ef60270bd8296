"""Mixtures of experts from a table: all matrices of a token's experts in one layer."""

from collections.abc import Mapping
from math import log
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.costs.roofline import RooflineKernels
from sim.costs.seconds import Seconds
from sim.costs.silicon import Silicon, fastest
from sim.costs.table import Table, table
from sim.models.architecture import Architecture
from sim.models.operators import layer_linears
from sim.models.work import IterationShape, iteration_operators

BALANCED = "balanced"
"""The tables' name of an even load; a real router's is less even."""


class MeasuredExperts:
    """Seconds of the experts of all layers, for an even load."""

    def __init__(self, ratios: Table, roofline: RooflineKernels, *, own: bool) -> None:
        """Take ratios to the roofline by tokens; `own`: measured on experts of just this shape."""
        self._ratios = ratios
        self._roofline = roofline
        self._own = own

    def tokens(self, tokens: int) -> Seconds:
        """Seconds for so many tokens."""
        seconds = self._ratios.at(tokens).seconds(experts_s(self._roofline, tokens))
        return seconds if self._own else seconds.as_extrapolated()


def experts_s(roofline: RooflineKernels, tokens: int) -> float:
    """Seconds of the experts of all layers by the roofline."""
    routed = {one.name for one in layer_linears(roofline.architecture) if one.copies > 1}
    shape = IterationShape(tokens, 0, 0, 1, 0, 0, 0)
    operators = iteration_operators(
        roofline.architecture, shape, roofline.dtype_bytes, roofline.kv_dtype_bytes
    )
    return sum(roofline.product_s(op, tokens) for op in operators if op.name in routed)


def measured_experts(
    tables: Silicon, roofline: RooflineKernels, dtype: str, tp_size: int
) -> MeasuredExperts:
    """The experts of a model, from the nearest shape that was measured.

    Raises:
        ValueError: nothing was measured in this type.
    """
    columns = tables.rows("moe", "moe", moe_dtype=dtype, distribution=BALANCED, moe_ep_size=1)
    if not len(columns["latency"]):
        raise ValueError(
            f"experts in {dtype} were not measured for {tables.framework} on {tables.gpu}; take "
            "another framework or cost=roofline"
        )
    architecture = roofline.architecture
    wanted = (
        architecture.hidden_size, architecture.moe_intermediate_size * tp_size,
        architecture.num_experts, architecture.experts_per_token, tp_size,
    )  # fmt: skip
    axes = ("hidden_size", "inter_size", "num_experts", "topk", "moe_tp_size")
    shapes = np.unique(np.stack([columns[axis] for axis in axes], axis=1), axis=0).tolist()
    nearest = min(shapes, key=lambda shape: (_distance(shape, wanted), shape))
    rows = fastest(_only(columns, axes, nearest), ("num_tokens",))
    like = _like(roofline, nearest)
    ratios = table((tokens, seconds / experts_s(like, int(tokens))) for tokens, seconds in rows)
    return MeasuredExperts(ratios, roofline, own=tuple(nearest) == wanted)


def _distance(one: list[int], other: tuple[int, ...]) -> float:
    return sum(abs(log(a / b)) for a, b in zip(one, other, strict=True))


def _only(
    columns: Mapping[str, NDArray[Any]], axes: tuple[str, ...], values: list[int]
) -> dict[str, NDArray[Any]]:
    keep = np.ones(len(columns["latency"]), dtype=bool)
    for axis, value in zip(axes, values, strict=True):
        keep &= columns[axis] == value
    return {name: column[keep] for name, column in columns.items()}


def _like(roofline: RooflineKernels, shape: list[int]) -> RooflineKernels:
    """A roofline of one layer with the experts that were measured."""
    hidden, inter, experts, topk, tp_size = shape
    single = Architecture(
        name="experts", family=roofline.architecture.family, num_layers=1, hidden_size=hidden,
        num_heads=1, num_kv_heads=1, head_dim=hidden, intermediate_size=inter, vocab_size=1,
        max_position_embeddings=1, rope_theta=1e4, num_experts=experts, experts_per_token=topk,
        moe_intermediate_size=max(inter // tp_size, 1), sparse_layers=(0,),
    )  # fmt: skip
    return roofline.like(architecture=single)
