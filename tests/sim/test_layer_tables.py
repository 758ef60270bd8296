"""Profiled layers in either format: what was measured comes back; what is broken is named."""

from pathlib import Path

import pytest

from hardware_models.parts import load_gpu
from sim.costs.kernel_cost import KernelCost
from sim.costs.kernel_model import KernelModel
from sim.costs.layer_tables import LayerKernels
from sim.costs.roofline import RooflineKernels
from sim.costs.table_files import read_tables
from sim.models.architecture import load_architecture
from sim.models.work import IterationShape

DENSE = """layer,tokens,time_us
embedding,1,2
embedding,64,3
qkv_proj,1,10
qkv_proj,64,20
layernorm,1,1
layernorm,64,2
final_layernorm,1,4
final_layernorm,64,5
"""
SEQUENCES = "layer,sequences,time_us\nlm_head,1,100\nlm_head,8,130\nsampler,1,7\nsampler,8,9\n"
ATTENTION = """prefill_chunk,kv_prefill,n_decode,kv_decode,time_us
32,0,0,0,40
32,64,0,0,90
0,0,2,128,30
0,0,8,128,60
32,0,2,128,110
32,0,8,128,160
32,64,8,128,200
"""
MLP = """num_tokens,num_tensor_parallel_workers,time_stats.emb.median,time_stats.attn_pre_proj.median,time_stats.add.median
1,1,0.002,0.010,0.001
64,1,0.003,0.020,0.002
64,2,0.003,0.012,0.002
"""  # noqa: E501
VIDUR_ATTENTION = """batch_size,prefill_chunk_size,kv_cache_size,is_prefill,num_tensor_parallel_workers,time_stats.attn_prefill.median,time_stats.attn_decode.median,time_stats.attn_kv_cache_save.median
1,32,0,True,1,0.04,0,0.001
1,32,64,True,1,0.09,0,0.001
2,0,128,False,1,0,0.03,0.001
8,0,128,False,1,0,0.06,0.001
"""  # noqa: E501


@pytest.fixture
def llmservingsim(tmp_path: Path) -> Path:
    folder = tmp_path / "bf16" / "tp1"
    folder.mkdir(parents=True)
    (folder / "dense.csv").write_text(DENSE)
    (folder / "per_sequence.csv").write_text(SEQUENCES)
    (folder / "attention.csv").write_text(ATTENTION)
    return tmp_path


@pytest.fixture
def vidur(tmp_path: Path) -> Path:
    (tmp_path / "mlp.csv").write_text(MLP)
    (tmp_path / "attention.csv").write_text(VIDUR_ATTENTION)
    return tmp_path


def cost_of(folder: Path, model: str = "tiny_llama") -> KernelCost:
    gpu = load_gpu("rtx_4090")
    peaks = KernelModel.of(gpu, gpu.peak.memory_bandwidth_bytes_per_s, "bf16")
    roofline = RooflineKernels(load_architecture(model), peaks, dtype_bytes=2, kv_dtype_bytes=2)
    return KernelCost(LayerKernels(read_tables(folder, 1), roofline))


LAYERS = load_architecture("tiny_llama").num_layers


@pytest.mark.parametrize(
    ("shape", "micros"),
    [
        (IterationShape(0, 0, 0, 0, 8, 8 * 128, 1), LAYERS * 60 + 107),
        (IterationShape.of([(32, 0)], (), 1), LAYERS * 40 + 107),
        (IterationShape.of([(32, 64)], [128] * 8, 8), LAYERS * 200 + 139),
    ],
    ids=["decode", "prompt", "mixed"],
)
def test_points_of_the_tables_come_back(
    llmservingsim: Path, shape: IterationShape, micros: float
) -> None:
    cost = cost_of(llmservingsim)
    rest = cost.kernels.tokens(shape.tokens).total
    assert cost.iteration_s(shape) == pytest.approx(micros * 1e-6 + rest, rel=1e-9)


def test_a_layer_has_two_norms_and_a_model_one_embedding(llmservingsim: Path) -> None:
    found = cost_of(llmservingsim).kernels.tokens(64)
    assert found.measured == pytest.approx((LAYERS * (20 + 2 * 2) + 3 + 5) * 1e-6, rel=1e-9)


def test_vidurs_format_reads_alike(vidur: Path) -> None:
    cost = cost_of(vidur)
    tokens = cost.kernels.tokens(64)
    assert tokens.measured == pytest.approx((LAYERS * (20 + 2 * 2) + 3) * 1e-6, rel=1e-9)
    decode = cost.kernels.decode_source(8, 8 * 128)
    assert decode.measured == pytest.approx(LAYERS * 61e-6, rel=1e-9)
    # Neither lm_head nor sampling is in these tables.
    assert cost.kernels.sampled(4).datasheet > 0


def test_what_the_tables_lack_is_counted_as_datasheet(vidur: Path) -> None:
    (vidur / "attention.csv").unlink()
    kernels = cost_of(vidur).kernels
    assert kernels.decode_source(8, 1024).measured == 0 < kernels.decode_source(8, 1024).datasheet


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("dense.csv", "layer,tokens\nqkv_proj,1\n", r"dense\.csv: lacks column time_us; it has"),
        ("dense.csv", DENSE + "qkv_proj,,3\n", r"dense\.csv:10: a value is missing; measure"),
        ("dense.csv", DENSE + "qkv_proj,9,x\n", r"dense\.csv:10: time_us='x' must be a number"),
        ("attention.csv", "", r"attention\.csv: cannot be read as CSV"),
        ("per_sequence.csv", None, r"lacks per_sequence\.csv; profile it"),
    ],
)
def test_a_broken_file_is_named(
    llmservingsim: Path, file: str, text: str | None, message: str
) -> None:
    path = llmservingsim / "bf16" / "tp1" / file
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_tables(llmservingsim, 1)


def test_a_number_of_ranks_that_was_not_measured_is_refused(
    llmservingsim: Path, vidur: Path
) -> None:
    for name in ("mlp.csv", "attention.csv"):
        (vidur / name).unlink()
    with pytest.raises(ValueError, match=r"tp_size=2 was not measured in .*; there is tp_size 1"):
        read_tables(llmservingsim, 2)
    (vidur / "bf16" / "tp1" / "dense.csv").unlink()
    (vidur / "mlp.csv").write_text(MLP)
    with pytest.raises(ValueError, match=r"tp_size=4 was not measured in .*; there is .* 1, 2"):
        read_tables(vidur, 4)


def test_a_folder_without_tables_or_with_several_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder; name one"):
        read_tables(tmp_path / "nowhere", 1)
    with pytest.raises(ValueError, match=r"must hold the tables of one model .* found: none"):
        read_tables(tmp_path, 1)
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mlp.csv").write_text(MLP)
    with pytest.raises(ValueError, match=r"found: .*one, .*other"):
        read_tables(tmp_path, 1)
