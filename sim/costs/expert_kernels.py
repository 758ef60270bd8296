"""The kernels of an attention or expert node's GPU, from the datasheet or from measured tables."""

from typing import Protocol

from hardware_models.parts import load_gpu
from hardware_models.schema import Gpu
from sim.costs.kernel_model import KernelModel
from sim.costs.measured_experts import experts_s
from sim.costs.roofline import RooflineKernels
from sim.costs.seconds import Seconds
from sim.costs.silicon import open_tables
from sim.costs.silicon_kernels import SiliconKernels
from sim.models.operators import Linear
from sim.models.work import IterationShape

Tables = tuple[str, str | None]
"""A serving framework and its version, null for the newest that was measured."""


class NodeKernels(Protocol):
    """Seconds of the kernels of one layer on one GPU, split by what they rest on."""

    def product(self, linear: Linear, rows: float, groups: float) -> Seconds:
        """A matrix product with so many rows; of experts, `groups` of them in one launch."""
        ...

    def attention(self, shape: IterationShape) -> Seconds:
        """Attention of a micro-batch."""
        ...

    def sampled(self, positions: int) -> Seconds:
        """The lm_head and sampling."""
        ...


class DatasheetKernels:
    """From datasheet numbers alone."""

    def __init__(self, roofline: RooflineKernels) -> None:
        self._roofline = roofline

    def product(self, linear: Linear, rows: float, groups: float) -> Seconds:
        """See `NodeKernels`."""
        elements = linear.parameters + rows * (linear.inputs + linear.outputs)
        moved = groups * elements * self._roofline.dtype_bytes
        return Seconds(
            datasheet=self._roofline.model.product_s(
                rows, linear.outputs, linear.inputs, moved, groups=groups
            )
        )

    def attention(self, shape: IterationShape) -> Seconds:
        """See `NodeKernels`."""
        if shape.prefill_tokens:
            return self._roofline.prompt_attention(shape)
        return self._roofline.decode_source(shape.num_decodes, shape.decode_context)

    def sampled(self, positions: int) -> Seconds:
        """See `NodeKernels`."""
        return self._roofline.sampled(positions)


class TableKernels:
    """As measured on this GPU, or on the one that stands in for it, scaled by both rooflines."""

    def __init__(self, roofline: RooflineKernels, gpu: Gpu, tables: Tables, types: tuple[str, str],
                 tp_size: int) -> None:  # fmt: skip
        """Read what one layer of the model needs.

        Args:
            roofline: of one rank's part of one layer, on this GPU.
            gpu: whose tables, or whose stand-in's, are read.
            tables: whose kernels.
            types: of weights and activations, and of KV.
            tp_size: GPUs that share the part.

        Raises:
            ValueError: the tables lack the GPU, the type or the operator; says what there is.
        """
        measured = gpu if gpu.proxy_of is None else load_gpu(gpu.proxy_of)
        bandwidth = measured.peak.memory_bandwidth_bytes_per_s
        theirs = roofline.like(model=KernelModel.of(measured, bandwidth, types[0]))
        self._own = measured is gpu
        self._silicon = SiliconKernels(
            open_tables(measured.name, *tables), theirs, dtype=types[0], kv_dtype=types[1],
            tp_size=tp_size,
        )  # fmt: skip
        self._ours, self._theirs = DatasheetKernels(roofline), DatasheetKernels(theirs)
        self._their_roofline = theirs

    def product(self, linear: Linear, rows: float, groups: float) -> Seconds:
        """See `NodeKernels`. Experts take the ratio of a batch that gives each so many rows."""
        ours = self._ours.product(linear, rows, groups)
        theirs = self._theirs.product(linear, rows, groups)
        if linear.copies == 1:
            found = self._silicon.products.product(linear.outputs, linear.inputs, rows)
            return self._scaled(found, ours, theirs)
        assert self._silicon.experts is not None
        tokens = max(round(rows * linear.copies / linear.used), 1)
        found = self._silicon.experts.tokens(tokens)
        ratio = theirs.total / experts_s(self._their_roofline, tokens)
        return self._scaled(found.times(ratio), ours, theirs)

    def attention(self, shape: IterationShape) -> Seconds:
        """See `NodeKernels`."""
        if shape.prefill_tokens:
            found = self._silicon.prompt_attention(shape)
        else:
            found = self._silicon.decode_source(shape.num_decodes, shape.decode_context)
        return self._scaled(found, self._ours.attention(shape), self._theirs.attention(shape))

    def sampled(self, positions: int) -> Seconds:
        """See `NodeKernels`."""
        found = self._silicon.sampled(positions)
        return self._scaled(found, self._ours.sampled(positions), self._theirs.sampled(positions))

    def _scaled(self, found: Seconds, ours: Seconds, theirs: Seconds) -> Seconds:
        if self._own or not found.total:
            return found
        return found.times(ours.total / theirs.total).as_extrapolated()
