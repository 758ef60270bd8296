"""The shipped parts: all readable, all sourced, and different only where the hardware differs."""

from dataclasses import asdict, fields, is_dataclass

import pytest

from hardware_models.composition import SHIPPED
from hardware_models.parts import (
    KINDS,
    load_cluster,
    load_gpu,
    load_link,
    load_node,
    names,
    read_part,
)
from hardware_models.schema import GpuTopology, LinkMeasured, peak_flops_per_s

ALL_PARTS = [(kind, name) for kind in KINDS for name in names(kind)]
GPUS = [
    "a100_80g", "a10g", "a40", "a800_80g", "h100_sxm", "h20",
    "h200", "h800_sxm", "l20", "l40s", "rtx_4090", "rtx_pro_6000",
    "rtx_pro_6000_workstation",
]  # fmt: skip
COMPOSED = {"name", "num_gpus", "num_nics", "source", "price", "proxy_of", "proxy_rule"}


def load(kind: str, name: str) -> object:
    return read_part(kind, SHIPPED / kind / f"{name}.yaml")


def groups(record: object, path: str = ""):
    """Every record below this one that holds numbers of its own, with its path."""
    own = [getattr(record, field.name) for field in fields(record)]
    if any(isinstance(value, int | float | dict) for value in own):
        yield path, record
    for field in fields(record):
        value = getattr(record, field.name)
        if is_dataclass(value):
            yield from groups(value, f"{path}.{field.name}")


@pytest.mark.parametrize(("kind", "name"), ALL_PARTS)
def test_every_part_is_readable_and_named_after_its_file(kind, name):
    part = load(kind, name)
    assert type(part) is KINDS[kind]
    assert part.name == name


@pytest.mark.parametrize(("kind", "name"), ALL_PARTS)
def test_every_group_of_numbers_has_a_source(kind, name):
    for path, record in groups(load(kind, name)):
        assert record.source.strip(), path


def test_every_yaml_is_in_a_known_folder():
    found = {path.relative_to(SHIPPED).parts[0] for path in SHIPPED.rglob("*.yaml")}
    assert found == set(KINDS)


def test_every_gpu_has_nodes_of_one_two_four_and_eight():
    assert names("gpu") == GPUS
    for gpu in GPUS:
        for count in (1, 2, 4, 8):
            node = load_node(f"{gpu}_x{count}")
            assert (node.gpu, node.num_gpus) == (load_gpu(gpu), count)


@pytest.mark.parametrize("name", names("node"))
def test_node_repeats_no_number_of_its_parts(name):
    lines = (SHIPPED / "node" / f"{name}.yaml").read_text().splitlines()
    own = {line.split(":")[0] for line in lines if line[:1].isalpha()}
    counts = {"gpu_topology", "gpus_per_pcie_switch", "num_cpus", "defaults"}
    assert own <= COMPOSED | counts


@pytest.mark.parametrize(
    ("cut", "whole", "differing"),
    [("a800_80g", "a100_80g", set()), ("h800_sxm", "h100_sxm", {"fp64"})],
)
def test_export_gpu_computes_as_its_original(cut, whole, differing):
    one, other = load_gpu(cut).peak, load_gpu(whole).peak
    rates = one.flops_per_s.items() ^ other.flops_per_s.items()
    assert {dtype for dtype, _ in rates} == differing
    ignored = {"flops_per_s", "source"}
    assert {k: v for k, v in asdict(one).items() if k not in ignored} == {
        k: v for k, v in asdict(other).items() if k not in ignored
    }


@pytest.mark.parametrize(
    ("cut", "whole", "nvlink"), [("a800_80g", "a100_80g", 300e9), ("h800_sxm", "h100_sxm", 450e9)]
)
def test_export_node_has_the_slower_nvlink(cut, whole, nvlink):
    assert load_node(f"{cut}_x8").peer_link.bandwidth_bytes_per_s == 200e9
    assert load_node(f"{whole}_x8").peer_link.bandwidth_bytes_per_s == nvlink


def test_clocks_agree_with_the_fp32_rates():
    """Two operations a cycle of 128 lanes an SM, of 64 on the A100's chip."""
    for name in names("gpu"):
        peak = load_gpu(name).peak
        if peak.boost_clock_hz is not None:
            lanes = 64 if name in ("a100_80g", "a800_80g") else 128
            rate = 2 * lanes * peak.sm_count * peak.boost_clock_hz
            assert rate == pytest.approx(peak.flops_per_s["fp32"], rel=0.01), name


def test_proxies_are_gpus_that_need_no_proxy():
    for name in GPUS:
        gpu = load_gpu(name)
        if gpu.proxy_of is not None:
            assert load_gpu(gpu.proxy_of).proxy_of is None


def test_link_bandwidth_is_per_direction():
    assert load_link("infiniband_400").bandwidth_bytes_per_s == 400e9 / 8
    assert load_link("nvlink3").peak.bandwidth_bytes_per_s == 600e9 / 2


def test_measured_link_wins_over_published():
    link = load_link("nvlink4")
    link.measured = LinkMeasured(bandwidth_bytes_per_s=400e9, source="here")
    assert (link.bandwidth_bytes_per_s, link.latency_s) == (400e9, link.peak.latency_s)
    link.measured.latency_s = 1e-6
    assert link.latency_s == 1e-6


def test_peak_rate_of_a_dtype():
    assert peak_flops_per_s(load_gpu("a100_80g"), "bf16") == 312e12
    with pytest.raises(ValueError, match=r"dtype='fp8' has no peak rate on a100_80g.*choose"):
        peak_flops_per_s(load_gpu("a100_80g"), "fp8")


def test_pcie_node_talks_over_its_host_link():
    node = load_node("l40s_x4")
    assert node.gpu_topology is GpuTopology.pcie
    assert node.peer_link == node.host_link == load_link("pcie4_x16")


def test_cluster_composes_nodes():
    cluster = load_cluster("h800_sxm_x8_by_16")
    assert cluster.node == load_node("h800_sxm_x8")
    assert cluster.network_link == load_link("infiniband_400")
