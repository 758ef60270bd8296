"""What measured attention is divided by, and what that does to reading between points."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware_models.parts import load_gpu
from sim.costs.attention_scale import AttentionScale, shortest_s
from sim.costs.kernel_model import KernelModel
from sim.costs.layer_tables import LayerKernels, LayerTables
from sim.costs.measured_attention import MeasuredAttention
from sim.costs.roofline import RooflineKernels
from sim.models.architecture import load_architecture
from sim.models.work import IterationShape

GPU = load_gpu("h100_sxm")
MODEL = KernelModel.of(GPU, GPU.peak.memory_bandwidth_bytes_per_s, "bf16")
ROOFLINE = RooflineKernels(
    load_architecture("llama_3_8b"), MODEL, dtype_bytes=2, kv_dtype_bytes=2
)  # fmt: skip
LAYERS = ROOFLINE.architecture.num_layers
LAUNCH_S = 7e-6
BATCHES, LENGTHS = (1, 4, 16, 64), (16, 128, 1024, 8192)


def test_next_to_no_work_takes_a_launch_a_layer() -> None:
    scale = AttentionScale(ROOFLINE, LAUNCH_S)
    assert scale.prompts_s(IterationShape.of([(1, 0)], (), 0)) == pytest.approx(
        LAYERS * LAUNCH_S, rel=0.05
    )


@given(st.integers(1, 256), st.integers(1, 10**6), st.integers(1, 10**5))
def test_more_to_read_takes_longer_and_as_much_longer_wherever_it_begins(
    requests: int, context: int, more: int
) -> None:
    scale = AttentionScale(ROOFLINE, LAUNCH_S)
    first = scale.decodes_s(requests, context + more) - scale.decodes_s(requests, context)
    again = scale.decodes_s(requests, context + 2 * more) - scale.decodes_s(
        requests, context + more
    )
    assert 0 < first == pytest.approx(again, rel=1e-6)


def test_a_launch_is_a_short_time_of_the_table_but_not_its_outlier() -> None:
    assert shortest_s(np.array([1e-9, *[8e-6] * 98, 1e-3])) == pytest.approx(8e-6)


def measured(batch: int, length: int) -> float:
    """One layer of a kernel that overlaps nothing: a launch, blocks, and its bytes at 70 %."""
    read_bytes = 4 * 1024 * batch * length
    return LAUNCH_S + 2e-7 * batch + read_bytes / (0.7 * MODEL.bytes_per_s)


def attention() -> MeasuredAttention:
    prompts = np.array([(b, n, LAUNCH_S + 1e-12 * b * n * n) for b in BATCHES for n in LENGTHS])
    decodes = np.array([(b, n, measured(b, n)) for b in BATCHES for n in LENGTHS])
    return MeasuredAttention(prompts, decodes, ROOFLINE, floor_bytes_per_s=1e15)


@pytest.mark.parametrize("batch", [2, 8, 32])
@pytest.mark.parametrize("length", [64, 500, 3000])
def test_a_kernel_that_adds_up_is_met_between_its_points(batch: int, length: int) -> None:
    found = attention().decode_source(batch, batch * length)
    assert found.total == found.interpolated
    assert found.total == pytest.approx(LAYERS * measured(batch, length), rel=0.05)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("length", LENGTHS)
def test_the_curve_goes_through_what_was_measured(batch: int, length: int) -> None:
    curve = attention().decode_attention(batch)
    assert curve.at(batch * length) == pytest.approx(LAYERS * measured(batch, length))
    assert attention().decode_source(batch, batch * length).interpolated == 0.0


def mixed_s(new: float, before: float, requests: float, context: float) -> float:
    """One layer of a launch that works off chunk and decoding requests one after the other."""
    pairs = new * before + new * new / 2
    return LAUNCH_S + 1e-11 * pairs + measured(int(requests), int(context))


def test_a_mixed_launch_that_adds_up_is_met_between_its_points() -> None:
    some = np.array([[1.0, 1e-4], [4096.0, 1e-2]])
    rows = np.array(
        [(c, h, n, kv, mixed_s(c, h, n, kv)) for c in (64, 512) for h in (0, 256, 2048)
         for n in (4, 16) for kv in (128, 1024)]
    )  # fmt: skip
    kernels = LayerKernels(LayerTables(source="", layer=some, once=some, mixed=rows), ROOFLINE)
    for new, before, requests, context in ((64, 0, 4, 128), (200, 700, 8, 400)):
        shape = IterationShape.of([(new, before)], [context] * requests, 0)
        wanted = LAYERS * mixed_s(new, before, requests, context)
        assert kernels.prompt_attention(shape).total == pytest.approx(wanted, rel=0.03)
