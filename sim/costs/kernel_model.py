"""How long one GPU kernel takes by the datasheet: tiles, waves, achieved shares, launches.

A roofline that knows that work comes in tiles and tiles in waves over the SMs (NVIDIA, "Matrix
Multiplication Background User's Guide"), that kernels reach a share of either peak, and that a
launch costs time however little there is to do. The shares are the same for every GPU; they are
of the order that well-tuned kernels reach and are judged by `benchmarks/operators.py`.
"""

from dataclasses import dataclass, replace
from math import ceil, sqrt

from hardware_models.schema import Cpu, Gpu, peak_flops_per_s

TILE_ROWS, TILE_COLUMNS = 128, 64
"""A matrix product's tile; fewer rows than that waste the rest of it."""
MIN_TILE_ROWS = 16
SPLIT_DEPTH = 256
"""Inner length that a thread block keeps at least when idle SMs share a tile's inner loop."""
KEYS_PER_SPLIT = 256
"""Context that a thread block of decode attention keeps at least."""
PACKING = ("hopper", "blackwell_datacenter")
"""Chip generations whose attention kernels pack queries (FlashAttention 3 and later)."""
ATTENTION_KEYS = 128
"""Keys that attention takes at once; those of a last, shorter step are computed in full."""
FULL_ROWS = 128
"""Rows of a tile of attention on those generations. On others it has half as many:
FlashAttention 2 serves a paged cache with its split kernel, whose tile is 64 x 128."""
L2_SPEEDUP = 2.0
"""Bandwidth of the last-level cache against that of the memory."""
LATENCY_CLOCK_HZ = 1.98e9
"""Clock at which launches and inner loops take what is stated here; they take as many cycles at any
other. What a thread block waits for is memory, whose clock is another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelModel:
    """Peaks of a device and the shares of them that kernels reach; `ideal`: all of them."""

    flops_per_s: float
    bytes_per_s: float
    sm_count: int | None = None
    """Without it work is not cut into tiles."""
    l2_bytes: float = 0.0
    product_share: float = 0.8
    """Of the peak FLOP/s, reached by a full wave of a matrix product."""
    attention_share: float = 0.6
    """Of the peak FLOP/s, reached by attention over a prompt."""
    memory_share: float = 0.85
    """Of the peak bandwidth."""
    launch_s: float = 2e-6
    """Start and end of a small kernel inside a CUDA graph."""
    depth_s: float = 3.5e-8
    """Latency of a product's inner loop, for each square root of its length."""
    attention_launch_s: float = 9e-6
    """As `launch_s` for attention, whose work is planned first."""
    merge_s: float = 5e-6
    """A second kernel that merges what the parts of a cut context gave."""
    block_s: float = 4e-6
    """Latency of a thread block of attention of `FULL_ROWS` rows that has next to nothing to do; it
    loads and stores its rows, so that one of fewer takes less."""
    empty_block_s: float = 3.5e-7
    """Of a thread block that finds that there is no row for it, and ends. Profiles of mixed batches
    by LLMServingSim (RTX 4090 and RTX PRO 6000): how much longer 64 decoding requests take beside a
    chunk of 2,048 tokens than beside one of 128."""
    attention_rows: int = FULL_ROWS // 2
    """Rows of a tile of prompt attention."""
    packs_queries: bool = False
    """Prompt attention puts the query heads that share a KV head into one tile."""
    fused: bool = False
    """Norms, activations and rotations cost nothing of their own."""

    @classmethod
    def ideal(cls, flops_per_s: float, bytes_per_s: float) -> "KernelModel":
        """Peaks that are reached, and nothing else (Williams et al., CACM 2009)."""
        return cls(
            flops_per_s=flops_per_s, bytes_per_s=bytes_per_s, product_share=1.0,
            attention_share=1.0, memory_share=1.0, launch_s=0.0, depth_s=0.0,
            attention_launch_s=0.0, merge_s=0.0, block_s=0.0, fused=True,
        )  # fmt: skip

    @classmethod
    def of(cls, part: Gpu | Cpu, bytes_per_s: float, dtype: str) -> "KernelModel":
        """The model of a chip: of a GPU as kernels reach its peaks, of a CPU the ideal one.

        Raises:
            ValueError: the chip states no rate of this dtype.
        """
        flops_per_s = peak_flops_per_s(part, dtype)
        if isinstance(part, Cpu):
            return cls.ideal(flops_per_s, bytes_per_s)
        model = cls(
            flops_per_s=flops_per_s,
            bytes_per_s=bytes_per_s,
            sm_count=part.peak.sm_count,
            l2_bytes=float(part.peak.l2_bytes or 0),
            packs_queries=part.architecture in PACKING,
            attention_rows=FULL_ROWS if part.architecture in PACKING else FULL_ROWS // 2,
        )
        return model.at_clock(part.peak.boost_clock_hz or LATENCY_CLOCK_HZ)

    def at_clock(self, clock_hz: float) -> "KernelModel":
        """The same with launches and inner loops at a clock of the SMs."""
        slower = LATENCY_CLOCK_HZ / clock_hz
        return replace(
            self,
            launch_s=slower * self.launch_s,
            depth_s=slower * self.depth_s,
            attention_launch_s=slower * self.attention_launch_s,
            merge_s=slower * self.merge_s,
        )

    def moving_s(self, num_bytes: float, *, cached: bool = False) -> float:
        """Seconds that the memory takes; `cached`: the bytes were touched just before."""
        seconds = num_bytes / (self.bytes_per_s * self.memory_share)
        if cached and num_bytes < self.l2_bytes:
            return seconds / L2_SPEEDUP
        return seconds

    def product_s(
        self, rows: float, columns: int, depth: int, num_bytes: float, *,
        groups: float = 1.0, cached: bool = False,
    ) -> float:  # fmt: skip
        """Seconds of a matrix product, or of several of the same shape in one launch.

        Args:
            rows: rows of one group: tokens.
            columns: of the output.
            depth: length of the inner sum.
            num_bytes: what all groups read and write.
            groups: products in the launch: experts that are hit; may be an expectation.
            cached: the operands were touched just before, as in a benchmark's loop.
        """
        computing = 2 * groups * rows * columns * depth / self.flops_per_s
        if self.sm_count:
            computing *= self._waves(rows, columns, depth, groups)
        moving = self.moving_s(num_bytes, cached=cached)
        busy = max(computing / self.product_share, moving)
        return self.launch_s + self.depth_s * sqrt(depth) + busy

    def _waves(self, rows: float, columns: int, depth: int, groups: float) -> float:
        """Time of whole tiles in whole waves, as a multiple of what the FLOPs alone take."""
        assert self.sm_count is not None
        tile_rows = min(TILE_ROWS, 16 * ceil(rows / 16))
        tiles = groups * ceil(rows / tile_rows) * ceil(columns / TILE_COLUMNS)
        splits = max(1.0, min(self.sm_count // tiles, depth / SPLIT_DEPTH))
        waves = ceil(tiles * splits / self.sm_count)
        done = waves * self.sm_count / splits * max(tile_rows, MIN_TILE_ROWS) * TILE_COLUMNS
        return done / (groups * rows * columns)

    def prompt_attention_s(
        self, flops: float, num_bytes: float, *, blocks: float = 0.0, longest_flops: float = 0.0,
        cached: bool = False,
    ) -> float:  # fmt: skip
        """Seconds of causal attention of one or several prompt chunks.

        Args:
            flops: of all chunks and heads, in whole tiles.
            num_bytes: queries, keys, values and outputs.
            blocks: thread blocks: tiles of rows, of all heads.
            longest_flops: of the last tile of rows of one head, which one SM computes alone.
            cached: the operands were touched just before.
        """
        reached = self.flops_per_s * self.attention_share
        computing = flops / reached
        if self.sm_count:
            computing = max(computing, longest_flops * self.sm_count / reached)
            computing += self.block_s * self.attention_rows / FULL_ROWS * blocks / self.sm_count
        moving = self.moving_s(num_bytes, cached=cached)
        return self.attention_launch_s + max(computing, moving)

    def padded_attention_s(self, flops: float) -> float:
        """Seconds that attention computes, whether or not the rows of its tiles are used."""
        return flops / (self.flops_per_s * self.attention_share)

    def decode_attention_s(
        self, flops: float, num_bytes: float, *, blocks: float = 0.0, heads: float = 0.0,
        cached: bool = False,
    ) -> float:  # fmt: skip
        """Seconds of attention of one new token each against the contexts.

        Args:
            flops: of all requests and heads.
            num_bytes: keys and values above all.
            blocks: thread blocks that the contexts can be cut into; fewer than there are SMs
                leave bandwidth unused. 0: enough.
            heads: KV heads of all requests, each of which takes a block at least.
            cached: the operands were touched just before.
        """
        computing = flops / (self.flops_per_s * self.attention_share)
        moving = self.moving_s(num_bytes, cached=cached)
        if self.sm_count and blocks:
            moving *= max(1.0, self.sm_count / blocks)
            moving = max(moving, self.block_s * heads / self.sm_count)
        merging = self.merge_s if blocks > heads else 0.0
        return self.attention_launch_s + merging + max(computing, moving)

    def elementwise_s(self, num_bytes: float) -> float:
        """Seconds of a norm, an activation or a rotation, whose operands come from the cache."""
        return self.launch_s + self.moving_s(num_bytes, cached=True)
