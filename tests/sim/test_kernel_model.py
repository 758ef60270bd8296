"""The roofline of a GPU: peaks are never beaten, tiles and launches cost what they should."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware_models.parts import load_gpu, names
from sim.costs.kernel_cost import KernelCost
from sim.costs.kernel_model import LATENCY_CLOCK_HZ, TILE_COLUMNS, TILE_ROWS, KernelModel
from sim.costs.roofline import RooflineKernels
from sim.models.architecture import load_architecture
from sim.models.work import IterationShape

H100 = load_gpu("h100_sxm")
MODEL = KernelModel.of(H100, H100.peak.memory_bandwidth_bytes_per_s, "bf16")


@given(st.integers(1, 9000), st.integers(16, 30000), st.integers(16, 30000))
def test_no_product_beats_the_datasheet(rows: int, columns: int, depth: int) -> None:
    moved = 2.0 * (rows * depth + depth * columns + rows * columns)
    seconds = MODEL.product_s(rows, columns, depth, moved)
    assert seconds > 2.0 * rows * columns * depth / MODEL.flops_per_s
    assert seconds > moved / MODEL.bytes_per_s


def test_one_tile_more_than_a_wave_takes_two_waves() -> None:
    assert MODEL.sm_count == 132
    bare = replace(MODEL, launch_s=0.0, depth_s=0.0, bytes_per_s=1e30)
    full = bare.product_s(TILE_ROWS, 132 * TILE_COLUMNS, 4096, 0.0)
    over = bare.product_s(TILE_ROWS, 132 * TILE_COLUMNS + 1, 4096, 0.0)
    assert over == pytest.approx(2 * full)
    flops = 2 * TILE_ROWS * 132 * TILE_COLUMNS * 4096
    assert full == pytest.approx(flops / (MODEL.flops_per_s * MODEL.product_share))


def test_an_ideal_device_is_the_plain_roofline() -> None:
    ideal = KernelModel.ideal(1e12, 1e10)
    assert ideal.product_s(10, 20, 30, 1e6) == max(2 * 10 * 20 * 30 / 1e12, 1e6 / 1e10)
    assert ideal.decode_attention_s(1e9, 1e3, blocks=1.0, heads=1.0) == 1e9 / 1e12


def test_few_blocks_leave_bandwidth_unused() -> None:
    bare = replace(MODEL, attention_launch_s=0.0, merge_s=0.0, block_s=0.0)
    assert bare.decode_attention_s(0.0, 1e9, blocks=66.0) == pytest.approx(
        2 * bare.decode_attention_s(0.0, 1e9, blocks=132.0)
    )


@pytest.mark.parametrize("gpu", names("gpu"))
def test_every_gpu_answers_for_every_type_that_it_states(gpu: str) -> None:
    part = load_gpu(gpu)
    bandwidth = part.peak.memory_bandwidth_bytes_per_s
    for dtype in part.peak.flops_per_s:
        model = KernelModel.of(part, bandwidth, dtype)
        kernels = RooflineKernels(
            load_architecture("llama_3_8b"), model, dtype_bytes=2, kv_dtype_bytes=2
        )
        cost = KernelCost(kernels, 1e-3)
        decode = cost.iteration_s(IterationShape.of((), [1000] * 8, 8))
        prompt = cost.iteration_s(IterationShape.of([(1000, 0)], (), 1))
        # Weights are read once by either; the prompt computes more.
        assert 1e-3 < decode < prompt


def kernels(gpu: str) -> RooflineKernels:
    part = load_gpu(gpu)
    model = KernelModel.of(part, part.peak.memory_bandwidth_bytes_per_s, "bf16")
    return RooflineKernels(load_architecture("llama_3_8b"), model, dtype_bytes=2, kv_dtype_bytes=2)


@pytest.mark.parametrize(("gpu", "rows"), [("a100_80g", 64), ("h100_sxm", 128 / 4)])
def test_decodes_beside_a_prompt_take_the_tiles_of_a_prompt(gpu: str, rows: float) -> None:
    """FlashAttention 2 computes a row of 64 for a query head, 3 a row of 128 for a KV head."""
    apart = kernels(gpu)
    apart = apart.like(model=replace(apart.model, block_s=0.0, empty_block_s=0.0, bytes_per_s=1e30))
    shape = IterationShape.of([(512, 0)], [2000] * 128, 0)
    pairs = rows * shape.decode_context
    flops = pairs * 4 * apart.architecture.query_size * apart.architecture.num_layers
    reached = apart.model.flops_per_s * apart.model.attention_share
    assert apart.mixed_decode_s(shape) == pytest.approx(flops / reached)


@pytest.mark.parametrize(("gpu", "grows"), [("a100_80g", True), ("h100_sxm", False)])
def test_a_longer_chunk_starts_more_empty_blocks_for_decodes(gpu: str, grows: bool) -> None:
    """FlashAttention 2's grid has the tiles of the longest chunk for every request."""
    short, long = (IterationShape.of([(new, 0)], [500] * 64, 0) for new in (64, 2048))
    apart = kernels(gpu)
    assert (apart.mixed_decode_s(long) > apart.mixed_decode_s(short)) is grows


def test_decodes_beside_a_prompt_take_as_long_as_alone_at_least() -> None:
    apart = kernels("h100_sxm")
    for context in (10, 1000, 50000):
        shape = IterationShape.of([(64, 0)], [context] * 4, 0)
        assert apart.mixed_decode_s(shape) >= apart.decodes_s(4, 4 * context)


def test_a_slower_clock_lengthens_launches_and_inner_loops_alone() -> None:
    half = MODEL.at_clock(LATENCY_CLOCK_HZ / 2)
    small = MODEL.product_s(1, 1, 4096, 0.0)
    assert half.product_s(1, 1, 4096, 0.0) == pytest.approx(2 * small, rel=0.02)
    many = 10**5
    assert half.product_s(many, many, 4096, 0.0) == pytest.approx(
        MODEL.product_s(many, many, 4096, 0.0), rel=1e-3
    )
    assert half.block_s == MODEL.block_s


def prompts_s(gpu: str, length: int, batch: int = 1024) -> float:
    """Of a memory that takes no time."""
    apart = kernels(gpu)
    apart = apart.like(model=replace(apart.model, bytes_per_s=1e30))
    return apart.prompts_s(IterationShape.of([(length, 0)] * batch, (), 0))


@pytest.mark.parametrize(("gpu", "rows"), [("l40s", 64), ("h100_sxm", 128 // 4)])
def test_a_prompt_takes_whole_tiles(gpu: str, rows: int) -> None:
    """Until a tile is full another row costs nothing; the next one adds a tile."""
    assert prompts_s(gpu, rows) == pytest.approx(prompts_s(gpu, rows - 8))
    assert prompts_s(gpu, rows + 1) > 1.9 * prompts_s(gpu, rows)


def test_one_row_is_packed_by_every_kernel() -> None:
    """A prompt of one token takes a tile a KV head, one of two tokens a tile a query head."""
    assert prompts_s("a100_80g", 2) > 3 * prompts_s("a100_80g", 1)


@given(st.integers(1, 5000), st.integers(0, 5000), st.sampled_from(["a100_80g", "h100_sxm"]))
def test_no_tile_computes_fewer_pairs_than_are_asked_for(new: int, old: int, gpu: str) -> None:
    apart, shape = kernels(gpu), IterationShape.of([(new, old)] * 300, (), 0)
    pair_flops = 4 * apart.architecture.query_size
    reached = apart.model.flops_per_s * apart.model.attention_share
    layers = apart.architecture.num_layers
    assert apart.prompts_s(shape) >= layers * shape.prefill_pairs * pair_flops / reached
