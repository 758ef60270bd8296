"""Seconds from datasheet numbers alone: each operator takes the longer of computing and moving.

Operators run one after another; none of them overlaps another. What a kernel reaches of the peaks,
and how work is cut into tiles, is `sim.costs.kernel_model`'s.
"""

from dataclasses import replace
from math import ceil

from sim.costs.curve import Curve
from sim.costs.kernel_model import ATTENTION_KEYS, KEYS_PER_SPLIT, KernelModel
from sim.costs.seconds import Seconds
from sim.models.architecture import Architecture
from sim.models.operators import layer_linears, lm_head
from sim.models.work import IterationShape, Operator, expected_experts, iteration_operators

CONTEXTS = tuple(2**power for power in range(21))
"""Lengths of one context at which decode attention is computed; straight lines in between."""
ELEMENTWISE_PER_LAYER = 5
"""Two norms with their additions, the rotation, the write to the cache and the activation."""
SAMPLING_KERNELS = 4
"""Widening, scaling, the largest logit, and its gathering."""


class RooflineKernels:
    """The kernels of one model, or of one rank's part of it, on one device."""

    def __init__(
        self, architecture: Architecture, model: KernelModel, *,
        dtype_bytes: int, kv_dtype_bytes: int,
    ) -> None:  # fmt: skip
        """Take a device.

        Args:
            architecture: what the device holds.
            model: its peaks and what kernels reach of them.
            dtype_bytes: bytes of an element of weights and activations.
            kv_dtype_bytes: bytes of an element of the KV cache.
        """
        self.architecture = architecture
        self.model = model
        self.dtype_bytes = dtype_bytes
        self.kv_dtype_bytes = kv_dtype_bytes
        self._linears = {one.name: one for one in layer_linears(architecture)}
        self._chunk = self._probe(decode=False)
        self._step = self._probe(decode=True)
        self._group = architecture.num_heads / architecture.num_kv_heads

    def like(
        self, *, architecture: Architecture | None = None, model: KernelModel | None = None
    ) -> "RooflineKernels":
        """The same with another model or device."""
        return RooflineKernels(
            architecture or self.architecture, model or self.model,
            dtype_bytes=self.dtype_bytes, kv_dtype_bytes=self.kv_dtype_bytes,
        )  # fmt: skip

    def smooth(self) -> "RooflineKernels":
        """The same without tiles: what ratios of measurements, which have them, are taken to."""
        return self.like(model=replace(self.model, sm_count=None))

    def tokens(self, tokens: int) -> Seconds:
        """Products, embedding and elementwise kernels."""
        if not tokens:
            return Seconds()
        operators = self._operators(IterationShape(tokens, 0, 0, 1, 0, 0, 0))
        seconds = self.elementwise_s(tokens) + sum(
            self.product_s(operator, tokens)
            for operator in operators
            if not operator.name.startswith("attention")
        )
        return Seconds(datasheet=seconds)

    def sampled(self, positions: int) -> Seconds:
        """The lm_head; sampling itself reads the logits once."""
        if not positions:
            return Seconds()
        (*_, head) = self._operators(IterationShape(1, 0, 0, 1, 0, 0, positions))
        return Seconds(datasheet=self.product_s(head, positions) + self.sampling_s(positions))

    def sampling_s(self, positions: int) -> float:
        """Seconds of sampling: the logits are widened, then scanned for the largest."""
        if self.model.fused:
            return 0.0
        logits_bytes = 4.0 * positions * self.architecture.vocab_size
        return SAMPLING_KERNELS * self.model.elementwise_s(logits_bytes)

    def prompt_attention(self, shape: IterationShape) -> Seconds:
        """Chunks first, then the decoding requests."""
        seconds = self.prompts_s(shape)
        if shape.num_decodes:
            seconds += self.mixed_decode_s(shape)
        return Seconds(datasheet=seconds)

    def prompts_s(self, shape: IterationShape, *, cached: bool = False) -> float:
        """Seconds of attention of the chunks alone; `cached`: their operands are."""
        pair_flops = self._chunk[2]
        a = self.architecture
        pairs, tiles = self._tiled(shape)
        context = shape.prefill_context / shape.num_prefills
        return a.num_layers * self.model.prompt_attention_s(
            pairs * pair_flops,
            self.prompt_work(shape)[1],
            blocks=tiles * a.num_heads,
            longest_flops=self.model.attention_rows * context * pair_flops / a.num_heads,
            cached=cached,
        )

    def prompt_work(self, shape: IterationShape) -> tuple[float, float]:
        """FLOPs, without those of half-empty tiles, and bytes of chunks in one layer."""
        token_bytes, context_bytes, pair_flops = self._chunk
        moved = shape.prefill_tokens * token_bytes + shape.prefill_context * context_bytes
        return shape.prefill_pairs * pair_flops, moved

    def decode_work(self, num_decodes: float, context: float) -> tuple[float, float]:
        """FLOPs and bytes of decoding requests in one layer."""
        token_bytes, context_bytes, pair_flops = self._step
        return context * pair_flops, num_decodes * token_bytes + context * context_bytes

    def _tiled(self, shape: IterationShape) -> tuple[float, float]:
        """Query-key pairs in whole tiles of rows, and tiles a query head, of chunks alike."""
        if not self.model.sm_count:
            return shape.prefill_pairs, 0.0
        rows = shape.prefill_tokens / shape.num_prefills
        before = ceil((shape.prefill_context / shape.num_prefills - rows) / ATTENTION_KEYS)
        # Packed, a tile holds the same rows of several query heads, and fewer are left empty. A
        # single row is packed by every kernel.
        packed = self._group if self.model.packs_queries or rows == 1 else 1.0
        height = self.model.attention_rows / packed
        tiles = ceil(rows / height)
        # Tiles in a row see the same number of whole steps of keys, then one step more.
        alike = max(round(ATTENTION_KEYS / height), 1)
        steps, rest = divmod(tiles, alike)
        seen = tiles * before + alike * steps * (steps + 1) / 2 + rest * (steps + 1)
        pairs = height * ATTENTION_KEYS * seen
        return shape.num_prefills * pairs, shape.num_prefills * tiles / packed

    def mixed_decode_s(self, shape: IterationShape) -> float:
        """Seconds of attention of decoding requests in one launch with prompt chunks.

        The kernel then works in a prompt's tiles: a new token fills one row of a tile, for each
        query head, or for each KV head where the kernel packs the queries that share one. Each tile
        is a thread block of its own, and contexts are not split. FlashAttention 2 also starts as
        many blocks for each request as the longest chunk has tiles.
        """
        alone = self.decodes_s(shape.num_decodes, shape.decode_context)
        model = self.model
        if not model.sm_count:
            return alone
        packed = self._group if model.packs_queries else 1.0
        rows = model.attention_rows / packed
        blocks = shape.num_decodes * self.architecture.num_heads / packed
        waiting = model.block_s
        if not model.packs_queries:
            tiles = ceil(shape.prefill_tokens / shape.num_prefills / rows)
            waiting += (tiles - 1) * model.empty_block_s
        padded = model.padded_attention_s(rows * shape.decode_context * self._step[2])
        padded += waiting * blocks / model.sm_count
        return max(alone, self.architecture.num_layers * padded)

    def decode_attention(self, num_decodes: int) -> Curve:
        """Straight lines between powers of two, and through where computing takes over."""
        knots = sorted({float(num_decodes * kv) for kv in CONTEXTS} | self._ridge(num_decodes))
        return Curve.through(knots, lambda at: self.decodes_s(num_decodes, at))

    def decode_source(self, num_decodes: int, context: float) -> Seconds:
        """All of it from the datasheet."""
        return Seconds(datasheet=self.decodes_s(num_decodes, context))

    def product_s(self, operator: Operator, rows: int) -> float:
        """Seconds of all executions of a matrix product, or of the embedding's lookup."""
        moved = operator.bytes_read + operator.bytes_written
        linear = self._linears.get(operator.name)
        if operator.name == "lm_head":
            linear = lm_head(self.architecture)
        if linear is None:
            return operator.count * (self.model.launch_s + self.model.moving_s(moved))
        groups, each = 1.0, float(rows)
        if linear.copies > 1:
            groups = expected_experts(linear.copies, linear.used, rows)
            each = rows * linear.used / groups
        return operator.count * self.model.product_s(
            each, linear.outputs, linear.inputs, moved, groups=groups
        )

    def elementwise_s(self, tokens: int) -> float:
        """Seconds of norms, rotations, cache writes and activations of all layers."""
        if self.model.fused:
            return 0.0
        a = self.architecture
        width = a.intermediate_size or a.moe_intermediate_size * max(a.experts_per_token, 1)
        elements = 8 * a.hidden_size + 2 * (a.query_size + 2 * a.kv_size) + 3 * width
        moved = tokens * elements * self.dtype_bytes / ELEMENTWISE_PER_LAYER
        return a.num_layers * ELEMENTWISE_PER_LAYER * self.model.elementwise_s(moved)

    def decodes_s(self, num_decodes: int, context: float, *, cached: bool = False) -> float:
        """Seconds of attention of decoding requests alone; `cached`: their keys are."""
        flops, num_bytes = self.decode_work(num_decodes, context)
        a = self.architecture
        blocks = num_decodes * a.num_kv_heads * max(1.0, context / num_decodes / KEYS_PER_SPLIT)
        return a.num_layers * self.model.decode_attention_s(
            flops,
            num_bytes,
            blocks=blocks,
            heads=num_decodes * a.num_kv_heads,
            cached=cached,
        )

    def _ridge(self, num_decodes: int) -> set[float]:
        """Where computing takes as long as moving, if it ever does."""
        token_bytes, context_bytes, pair_flops = self._step
        reached = self.model.flops_per_s * self.model.attention_share
        gain = pair_flops / reached - self.model.moving_s(context_bytes)
        ridge = num_decodes * self.model.moving_s(token_bytes) / gain if gain > 0 else 0.0
        return {ridge} if ridge > num_decodes else set()

    def _probe(self, *, decode: bool) -> tuple[float, float, int]:
        """Bytes of a token, bytes of a context token and FLOPs of a pair, in one layer.

        Attention is linear in its shape, so two probes of the operator table give all three.
        """

        def operator(context: int) -> Operator:
            shape = IterationShape(1, context, context, 1, 0, 0, 0)
            if decode:
                shape = IterationShape(0, 0, 0, 0, 1, context, 0)
            return next(op for op in self._operators(shape) if op.name.startswith("attention"))

        none, one = operator(0), operator(1)
        token_bytes = none.bytes_read + none.bytes_written
        return token_bytes, one.bytes_read + one.bytes_written - token_bytes, one.flops

    def _operators(self, shape: IterationShape) -> list[Operator]:
        return iteration_operators(self.architecture, shape, self.dtype_bytes, self.kv_dtype_bytes)
