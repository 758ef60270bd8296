"""Costs from NVIDIA's tables: measured points come back, and what is not there is refused."""

from pathlib import Path

import pytest

pytest.importorskip("aiconfigurator_core")

from dataclasses import replace

import pandas as pd

from hardware_models.parts import load_gpu
from sim.costs.collective_silicon import silicon_folder
from sim.costs.kernel_cost import KernelCost
from sim.costs.kernel_model import KernelModel
from sim.costs.roofline import RooflineKernels
from sim.costs.seconds import Seconds
from sim.costs.silicon import open_tables
from sim.costs.silicon_kernels import SiliconKernels
from sim.models.architecture import load_architecture
from sim.models.parallel import tensor_part
from sim.models.work import IterationShape
from sim.scenario import CostFamily, Dtype, Model, Scenario
from sim.setup import prepare


def kernels(gpu: str, model: str = "llama_3_8b", **options: object) -> SiliconKernels:
    part = load_gpu(gpu)
    peaks = KernelModel.of(part, part.peak.memory_bandwidth_bytes_per_s, "bf16")
    tables = open_tables(gpu, "vllm", None)
    wanted = {"dtype": "bf16", "kv_dtype": "bf16"} | options
    roofline = RooflineKernels(load_architecture(model), peaks, dtype_bytes=2, kv_dtype_bytes=2)
    return SiliconKernels(tables, roofline, **wanted)


def frame(file: str) -> pd.DataFrame:
    return pd.read_parquet(Path(silicon_folder()) / file)


H100 = kernels("h100_sxm")


def test_a_product_that_was_measured_takes_its_measured_time() -> None:
    gemm = frame("h100_sxm/gemm/vllm/0.24.0/gemm_perf.parquet")
    mine = gemm[(gemm.gemm_dtype == "bfloat16") & (gemm.n == 4096) & (gemm.k == 4096)]
    for rows in (1, 64, 2048, 32768):
        (latency,) = mine[mine.m == rows].latency
        found = H100.products.product(4096, 4096, rows)
        assert found == Seconds(measured=pytest.approx(latency * 1e-3, rel=1e-9))


def test_attention_that_was_measured_takes_its_measured_time() -> None:
    rows = frame("h100_sxm/attention/vllm/0.24.0/generation_attention_perf.parquet")
    mine = rows[
        (rows.num_heads == 32) & (rows.num_key_value_heads == 8) & (rows.head_dim == 128)
        & (rows.window_size == 0) & (rows.kv_cache_dtype == "bfloat16")
    ]  # fmt: skip
    # 64 contexts of 4,096 tokens are a gibibyte, which no cache holds.
    latency = mine[(mine.batch_size == 64) & (mine.isl + mine.step == 4096)].latency.min()
    found = H100.decode_source(64, 64 * 4096)
    assert found == Seconds(measured=pytest.approx(32 * latency * 1e-3, rel=1e-9))
    assert H100.decode_attention(64).at(64 * 4096) == pytest.approx(found.total)


def test_contexts_that_a_cache_could_hold_are_read_from_memory() -> None:
    """A benchmark reads the same keys again and again; an engine reads weights in between."""
    found = H100.decode_source(8, 8 * 2048).total
    read_bytes = 32 * 8 * 2048 * 2 * 2 * 1024
    assert read_bytes / found < load_gpu("h100_sxm").peak.memory_bandwidth_bytes_per_s


def test_between_points_time_is_interpolated_and_beyond_them_extrapolated() -> None:
    between = H100.products.product(4096, 4096, 1500)
    assert between.measured == between.extrapolated == 0.0 < between.interpolated
    beyond = H100.products.product(128256, 4096, 64)
    assert beyond.measured == beyond.interpolated == 0.0 < beyond.extrapolated


def test_heads_that_were_not_measured_are_extrapolated() -> None:
    found = kernels("h100_sxm", "llama_2_7b").decode_source(16, 16 * 1024)
    assert found.total == found.extrapolated > 0


def test_an_iteration_is_the_sum_of_its_parts() -> None:
    cost = KernelCost(H100, 5e-4)
    for shape in (
        IterationShape.of((), [700] * 40, 40),
        IterationShape.of([(1000, 0), (500, 200)], [900] * 7, 8),
    ):
        assert cost.sources(shape).total == pytest.approx(cost.iteration_s(shape), rel=1e-9)
    assert cost.sources(IterationShape.of((), [700] * 40, 40)).datasheet > 5e-4


@pytest.mark.parametrize("model", ["mixtral_8x7b", "qwen3_30b_a3b", "dbrx"])
def test_experts_are_read_from_their_own_table(model: str) -> None:
    found = kernels("h200", model)
    assert found.experts is not None
    assert 0 < found.experts.tokens(8).total < found.experts.tokens(4096).total


def test_ranks_share_the_work() -> None:
    one = kernels("h100_sxm", "llama_3_70b")
    rank = one.roofline.like(architecture=tensor_part(one.architecture, 4))
    four = SiliconKernels(
        open_tables("h100_sxm", "vllm", None), rank, dtype="bf16", kv_dtype="bf16", tp_size=4
    )
    ratio = one.tokens(2048).total / four.tokens(2048).total
    assert 3 < ratio < 4.5


def scenario(**fields: object) -> Scenario:
    base = {"gpu": load_gpu("h100_sxm"), "model": Model(name="llama_3_8b"),
            "cost": CostFamily.profiled}  # fmt: skip
    return Scenario(**(base | fields))


def test_a_gpu_without_tables_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"gpu=rtx_4090 has no measured tables.*a100_80g.*h200"):
        prepare(scenario(gpu=load_gpu("rtx_4090")))


def test_a_version_that_was_not_measured_is_refused_with_those_that_were() -> None:
    engine = replace(scenario().engine, framework_version="9.9")
    with pytest.raises(ValueError, match=r"framework_version=9\.9 has no .* there are: 0\.24\.0"):
        prepare(scenario(engine=engine))


def test_a_framework_that_was_not_measured_is_refused_with_those_that_were() -> None:
    engine = replace(scenario().engine, framework="lmdeploy")
    with pytest.raises(ValueError, match=r"engine\.framework=lmdeploy has no .*sglang, trtllm"):
        prepare(scenario(engine=engine))


def test_a_type_without_measurements_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.dtype=fp16 has no measurements.*bf16, fp8"):
        prepare(scenario(model=Model(name="llama_3_8b", dtype=Dtype.fp16)))


@pytest.mark.parametrize("gpu", ["a10g", "a40", "a800_80g", "h20", "h800_sxm", "l20"])
def test_a_gpu_without_tables_takes_its_proxys_and_says_so(gpu: str) -> None:
    cost = prepare(scenario(gpu=load_gpu(gpu))).cost
    assert isinstance(cost, KernelCost)
    for shape in (IterationShape.of((), [300] * 9, 9), IterationShape.of([(300, 0)], (), 1)):
        sources = cost.sources(shape)
        assert sources.measured == sources.interpolated == 0.0
        assert sources.extrapolated > 0.9 * sources.total
        assert cost.iteration_s(shape) == pytest.approx(sources.total, rel=1e-9)


def test_a_proxy_scales_with_what_bounds_the_kernel() -> None:
    """An H20 has more bandwidth than an H100 and a seventh of its FLOP/s."""
    costs = {name: prepare(scenario(gpu=load_gpu(name))).cost for name in ("h20", "h100_sxm")}
    decode, prompt = IterationShape.of((), [300], 1), IterationShape.of([(4096, 0)], (), 1)
    h20, h100 = load_gpu("h20").peak, load_gpu("h100_sxm").peak
    slower = costs["h20"].iteration_s(prompt) / costs["h100_sxm"].iteration_s(prompt)
    assert slower == pytest.approx(h100.flops_per_s["bf16"] / h20.flops_per_s["bf16"], rel=0.15)
    assert costs["h20"].iteration_s(decode) < costs["h100_sxm"].iteration_s(decode)
