"""aiconfigurator-core's tables of collectives: units, stamps, refusals; skipped without it."""

import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from hardware_models.parts import load_gpu, load_node
from sim.costs.alpha_beta import Hop
from sim.costs.collective_costs import measured_collectives
from sim.costs.collective_silicon import read_silicon, release, silicon_gpus
from sim.costs.collective_tables import CollectiveTable, Measured, Source
from sim.costs.expert_all_to_all import (
    PHASES,
    ExpertLinks,
    exchanged_bytes,
    fit_expert_links,
    read_deepep,
)
from sim.costs.link_collectives import NCCL, fit_library

pytestmark = pytest.mark.skipif(
    find_spec("aiconfigurator_core") is None, reason="aiconfigurator-core is not installed"
)
BUS = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0}
"""Times (n - 1) / n of the payload pass every port, as nccl-tests counts bus bandwidth."""


def table(gpu, **options):
    return measured_collectives(load_gpu(gpu), **options)


@pytest.mark.parametrize("gpu", ["a100_80g", "h100_sxm", "h200"])
@pytest.mark.parametrize("operation", BUS)
def test_sizes_in_elements_and_times_in_ms_fit_the_peak_of_the_link(gpu, operation):
    """Among eight, large messages reach two thirds of the link's peak or more; read as bytes, half.

    In-switch reduction (NVLS) lets an all-reduce of H100 seem about as fast as its link.
    """
    peak = load_node(f"{gpu}_x8").gpu_link.bandwidth_bytes_per_s
    payload = 2.0**29
    seconds, source = table(gpu, dtype="fp16").seconds(operation, 8, payload)
    assert source is Source.measured
    bus = BUS[operation] * payload * 7 / 8 / seconds
    assert 0.65 * peak < bus < 1.05 * peak


def test_one_byte_types_take_as_long_as_two_byte_types_of_as_many_bytes():
    for operation in ("all_gather", "all_to_all"):
        one, two = (
            table("a100_80g", dtype=dtype).seconds(operation, 8, 2.0**29).seconds
            for dtype in ("int8", "bf16")
        )
        assert one == pytest.approx(two, rel=0.02)


def test_an_engines_all_reduce_is_its_own_and_the_rest_stays_nccls():
    nccl, vllm = table("h100_sxm"), table("h100_sxm", all_reduce="vllm")
    assert vllm.seconds("all_reduce", 8, 8192.0) != nccl.seconds("all_reduce", 8, 8192.0)
    assert vllm.seconds("all_gather", 8, 8192.0) == nccl.seconds("all_gather", 8, 8192.0)
    assert "vllm" in vllm.name


def test_rows_count_for_the_version_that_they_name_and_not_for_their_folder(tmp_path, monkeypatch):
    """Folder 2.1 holds rows of 2.9 and, twice, of 2.29; folder 2.2 holds rows that name none."""
    import pyarrow
    from pyarrow import parquet

    def write(folder, rows):
        path = tmp_path / "h100_sxm" / "comm" / "nccl" / folder
        path.mkdir(parents=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows), path / "nccl_perf.parquet")

    row = {"op_name": "alltoall", "nccl_dtype": "half", "num_gpus": 4, "message_size": 100}
    named = [("2.9", 1.0), ("2.29", 2.0), ("2.29", 4.0)]
    write("2.1", [row | {"version": v, "latency": ms} for v, ms in named])
    write("2.2", [row | {"latency": 8.0}])
    monkeypatch.setattr("sim.costs.collective_silicon.silicon_folder", lambda: tmp_path)
    want = Measured("all_to_all", "half", 4, 1, 200.0, 0.0)
    assert read_silicon("h100_sxm") == (
        [want._replace(seconds=0.002), want._replace(seconds=0.004)], "2.29"
    )  # fmt: skip
    assert read_silicon("h100_sxm", version="2.9") == ([want._replace(seconds=0.001)], "2.9")
    assert read_silicon("h100_sxm", version="2.2") == ([want._replace(seconds=0.008)], "2.2")
    with pytest.raises(
        ValueError, match=r"nccl 3 was not measured on h100_sxm; .*: 2.2, 2.9, 2.29"
    ):
        read_silicon("h100_sxm", version="3")


def test_copies_of_another_frameworks_rows_count_for_that_framework():
    """The package's sglang/0.5.6.post2 on H100 repeats TensorRT-LLM's rows."""
    with pytest.raises(ValueError, match=r"sglang 0.5.6.post2 was not measured on h100_sxm"):
        read_silicon("h100_sxm", "sglang", "0.5.6.post2")


def test_versions_are_ordered_as_numbers():
    ordered = ["1.3.0rc10", "1.3.0rc20", "2.9", "2.29", "2.29.2"]
    assert sorted(reversed(ordered), key=release) == ordered


@pytest.mark.parametrize(
    ("gpu", "options", "message"),
    [
        (
            "rtx_4090",
            {},
            r"no collectives were measured on rtx_4090; there are: a100_80g.*h100_sxm",
        ),
        ("h100_sxm", {"dtype": "fp8"}, r"dtype='fp8' were measured; there are: fp16, bf16, int8"),
        ("h100_sxm", {"all_reduce": "mpi"}, r"library='mpi' was measured on h100_sxm; .*: .*vllm"),
        ("h100_sxm", {"version": "1.0"}, r"nccl 1.0 was not measured on h100_sxm; there are: 2.23"),
        ("h800_sxm", {}, r"h100_sxm stands in for it by the bandwidth.*give the node"),
    ],
)
def test_what_the_package_lacks_is_refused_with_what_it_has(gpu, options, message):
    with pytest.raises(ValueError, match=message):
        table(gpu, **options)


def test_send_recv_was_not_measured_and_is_refused():
    with pytest.raises(
        ValueError, match=r"no operation 'send_recv' in bf16; there are: all_gather"
    ):
        table("h100_sxm").seconds("send_recv", 2, 1.0)


def test_a_gpu_that_another_stands_in_for_is_slower_by_its_links_and_extrapolated():
    h100, h800 = table("h100_sxm"), table("h800_sxm", node=load_node("h800_sxm_x8"))
    large, small = 2.0**29, 512.0
    slower = [
        h800.seconds("all_gather", 8, size).seconds / h100.seconds("all_gather", 8, size).seconds
        for size in (large, small)
    ]
    assert slower[0] == pytest.approx(450 / 200, rel=0.02)
    assert slower[1] == pytest.approx(1, rel=0.02)
    assert h800.seconds("all_gather", 8, large).source is Source.extrapolated


def test_a_stand_in_whose_gpus_meet_elsewhere_is_refused():
    with pytest.raises(ValueError, match=r"a100_80g cannot stand in for a40.*switch.*over pairs"):
        table("a40", node=load_node("a40_x8"))


def test_what_nccl_makes_of_links_is_the_fit_on_a100():
    rows, version = read_silicon("a100_80g", version="2.27.3")
    half = [row for row in rows if row.dtype == "half"]
    found = fit_library(load_node("a100_80g_x8"), half)
    assert version == "2.27.3"
    assert found.launch_s == pytest.approx(NCCL.launch_s, rel=0.01)
    assert found.step_s == pytest.approx(NCCL.step_s, rel=0.01)
    assert found.bandwidth_share == pytest.approx(NCCL.bandwidth_share, rel=0.01)


@pytest.mark.parametrize("gpu", ["a100_80g", "h100_sxm", "h200", "l40s", "rtx_pro_6000"])
def test_held_out_sizes_are_within_five_per_cent(gpu):
    rows, _ = read_silicon(gpu)
    errors = []
    for dtype in ("half", "int8"):
        for curve in CollectiveTable(rows, dtype, name=gpu).curves.values():
            for i in range(1, len(curve.payloads) - 1):
                points = zip(curve.payloads, curve.measured_s, strict=True)
                rest = type(curve)(point for j, point in enumerate(points) if j != i)
                errors.append(rest.at(curve.payloads[i]).seconds / curve.measured_s[i] - 1)
    assert np.median(np.abs(errors)) <= 0.05


def test_dispatch_and_combine_send_the_bytes_that_deepep_counts():
    assert exchanged_bytes("dispatch", 128, 8, 7168) == 128 * 8 * (7168 + 56 * 4)
    assert exchanged_bytes("combine", 128, 8, 7168) == 128 * 8 * 7168 * 2
    with pytest.raises(ValueError, match=r"phase='prepare' is not known; there are: dispatch"):
        exchanged_bytes("prepare", 1, 1, 128)


@pytest.mark.parametrize("phase", PHASES)
def test_two_hops_explain_deepeps_table_and_its_largest_runs_from_the_smaller(phase):
    rows = read_deepep("h100_sxm")
    smaller = fit_expert_links([row for row in rows if row.num_nodes < 8], phase)
    judged = [row for row in rows if row.num_nodes == 8 and row.phase == phase]
    errors = [smaller.seconds(row.payload_bytes, 8) / row.seconds - 1 for row in judged]
    assert len(errors) > 10
    assert np.median(np.abs(errors)) <= 0.10
    ports = load_node("h100_sxm_x8").nic_link.bandwidth_bytes_per_s
    assert 0.8 * ports < smaller.between.bytes_per_s < 1.1 * ports


def test_a_slower_gpu_link_slows_only_what_it_holds_up():
    hop = Hop(latency_s=1e-5, bytes_per_s=200e9)
    links = ExpertLinks(inside=hop, between=hop)
    for ratio, expected in ((1.0, 200e9), (0.9, 200e9), (0.5, 125e9)):
        other = links.with_gpu_link(ratio, reached_bytes_per_s=250e9)
        assert other.inside == Hop(latency_s=1e-5, bytes_per_s=expected)
        assert other.between == hop


def test_deepep_is_refused_where_it_was_not_measured():
    with pytest.raises(ValueError, match=r"DeepEP was not measured on gpu='a100_80g'"):
        read_deepep("a100_80g")


def test_reading_tables_runs_none_of_the_packages_code():
    code = (
        "import sys; from sim.costs.collective_silicon import read_silicon;"
        "read_silicon('h100_sxm');"
        "heavy = ('aiconfigurator_core', 'pandas', 'scipy', 'torch');"
        "print([name for name in heavy if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_gpus_are_listed_by_our_names():
    ours = {"a100_80g", "h100_sxm", "h200", "l40s", "rtx_pro_6000", "b200_sxm"}
    assert ours <= set(silicon_gpus())
