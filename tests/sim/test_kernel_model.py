"""The roofline of a GPU: peaks are never beaten, tiles and launches cost what they should."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware_models.parts import load_gpu, names
from sim.costs.kernel_cost import KernelCost
from sim.costs.kernel_model import TILE_COLUMNS, TILE_ROWS, KernelModel
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


def test_decodes_beside_a_prompt_take_the_tiles_of_a_prompt() -> None:
    """FlashAttention 2 computes a row of 128 for a decoding request in such a batch."""
    llama = load_architecture("llama_3_8b")
    apart = RooflineKernels(llama, MODEL, dtype_bytes=2, kv_dtype_bytes=2)
    unpacked = RooflineKernels(
        llama, replace(MODEL, packs_queries=False), dtype_bytes=2, kv_dtype_bytes=2
    )
    context = 128 * 2000
    alone = apart.decodes_s(128, context)
    assert unpacked.mixed_decode_s(128, context) > apart.mixed_decode_s(128, context) >= alone
    padded = 128 * context * 4 * llama.query_size * llama.num_layers
    reached = MODEL.flops_per_s * MODEL.attention_share
    assert unpacked.mixed_decode_s(128, context) == pytest.approx(padded / reached)
