"""Attention and expert nodes from measured kernels: what is read, and what is said of it."""

import pytest

pytest.importorskip("aiconfigurator_core")

from expert_cases import placed

from hardware_models.parts import load_gpu, load_node
from sim.api import run
from sim.costs.expert_kernels import DatasheetKernels, TableKernels
from sim.costs.expert_nodes import AttentionNode, ElementTypes, ExpertNode, Reach, one_layer
from sim.costs.kernel_model import KernelModel
from sim.costs.roofline import RooflineKernels
from sim.costs.silicon import open_tables
from sim.costs.silicon_kernels import SiliconKernels
from sim.models.architecture import load_architecture
from sim.models.operators import layer_linears
from sim.models.parallel import tensor_part
from sim.models.work import IterationShape
from sim.scenario import CostFamily

MIXTRAL = load_architecture("mixtral_8x22b")
TYPES = ElementTypes("bf16", 2, 2)
TABLES = Reach(tables=("vllm", None))
DECODES = IterationShape(0, 0, 0, 0, 64, 64 * 700, 64)


def kernels_of(gpu: str, tp_size: int = 1) -> tuple[TableKernels, RooflineKernels]:
    part, rank = load_gpu(gpu), tensor_part(one_layer(MIXTRAL), tp_size)
    peaks = KernelModel.of(part, part.peak.memory_bandwidth_bytes_per_s, "bf16")
    roofline = RooflineKernels(rank, peaks, dtype_bytes=2, kv_dtype_bytes=2)
    return TableKernels(roofline, part, ("vllm", None), ("bf16", "bf16"), tp_size), roofline


def test_kernels_of_a_gpu_with_tables_are_those_that_a_replica_reads():
    ours, roofline = kernels_of("h100_sxm", 2)
    silicon = SiliconKernels(
        open_tables("h100_sxm", "vllm", None), roofline, dtype="bf16", kv_dtype="bf16", tp_size=2
    )
    qkv = next(one for one in layer_linears(roofline.architecture) if one.name == "qkv_projection")
    assert ours.product(qkv, 64, 1) == silicon.products.product(qkv.outputs, qkv.inputs, 64)
    assert ours.attention(DECODES) == silicon.decode_source(64, 64 * 700)
    assert ours.sampled(64) == silicon.sampled(64)
    # Both products of all experts, at the rows that an even batch gives each, are the whole of it.
    assert silicon.experts is not None
    tokens, linears = 128, {one.name: one for one in layer_linears(roofline.architecture)}
    rows = tokens * MIXTRAL.experts_per_token / MIXTRAL.num_experts
    both = [
        ours.product(linears[name], rows, MIXTRAL.num_experts).total
        for name in ("expert_gate_up", "expert_down")
    ]
    assert sum(both) == pytest.approx(silicon.experts.tokens(tokens).total, rel=0.01)


def test_a_gpu_without_tables_takes_its_stand_ins_scaled_and_all_is_extrapolated():
    ours, roofline = kernels_of("h20")
    theirs, their_roofline = kernels_of("h100_sxm")
    found = ours.attention(DECODES)
    ratio = DatasheetKernels(roofline).attention(DECODES).total
    ratio /= DatasheetKernels(their_roofline).attention(DECODES).total
    assert found.total == pytest.approx(theirs.attention(DECODES).total * ratio)
    assert found.measured == found.interpolated == 0.0
    assert found.extrapolated > 0.0


@pytest.mark.parametrize("tp_size", [1, 2, 8])
def test_nodes_take_about_as_long_by_tables_as_by_the_datasheet(tp_size: int):
    node = load_node("h100_sxm_x8")
    for kind, work in ((AttentionNode, DECODES), (ExpertNode, [64.0])):
        by_tables, by_datasheet = (
            kind(MIXTRAL, node, tp_size, TYPES, reach).layer_s(work)  # pyright: ignore[reportArgumentType]
            for reach in (TABLES, Reach())
        )
        assert by_tables != by_datasheet
        assert 0.5 < by_tables / by_datasheet < 2.0


def test_a_run_says_what_its_seconds_rest_on():
    result = run(placed(cost=CostFamily.profiled))
    shares = result.cost_shares
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["extrapolated"] > 0.3, "H20 has no tables of its own"
    assert run(placed()).cost_shares == {"datasheet roofline": 1.0}


def test_a_gpu_whose_experts_nobody_measured_is_refused():
    with pytest.raises(ValueError, match="experts in bfloat16 were not measured for vllm on a100"):
        run(placed(cost=CostFamily.profiled, node=load_node("a100_80g_x8")))
