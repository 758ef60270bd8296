"""Reading and writing parts without Hydra: round trips, the user's own folders, refusals."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hardware_models.calibration import COEFFICIENTS
from hardware_models.parts import dump_node, load_gpu, load_link, load_node, names, read_node
from hardware_models.schema import Calibration, Cpu, FittedIteration, Node

GPU = """
name: mine
architecture: test
peak:
  flops_per_s: {fp32: 1e12}
  memory_bytes: 1000
  memory_bandwidth_bytes_per_s: 5
  source: this test
"""


def write(folder: Path, kind: str, name: str, text: str) -> Path:
    path = folder / kind / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def this_machine() -> Node:
    fit = FittedIteration(
        body_tokens=[1.0, 8.0],
        body_s=[0.1, 0.30000000000000004],
        head_tokens=[1.0, 4.0],
        head_s=[0.01, 0.02],
        coefficients=dict.fromkeys(COEFFICIENTS, 1e-07),
        heldout_median_error=0.03,
        heldout_p90_error=0.1,
        max_context_tokens=220,
        num_shapes=12,
        num_heldout=6,
        dtype="fp32",
    )
    calibration = Calibration(
        fingerprint="abc", torch_version="2.9.0", threads=2, models={"tiny": fit}
    )
    cpu = Cpu(name="here", architecture="x86_64", num_cores=2, source="the machine itself")
    return Node(name="this_machine", cpu=cpu, calibration=calibration, source="diptych calibrate")


@pytest.mark.parametrize("name", names("node"))
def test_dumped_node_reads_back_equal(name, tmp_path):
    node = load_node(name)
    dump_node(node, tmp_path / "node" / f"{name}.yaml")
    assert load_node(name, folders=(tmp_path,)) == node
    assert read_node(tmp_path / "node" / f"{name}.yaml") == node


def test_calibrated_machine_reads_back_equal_and_leaves_no_temporary_file(tmp_path):
    path = tmp_path / "new" / "node" / "this_machine.yaml"
    dump_node(this_machine(), path)
    assert read_node(path) == this_machine()
    assert [file.name for file in path.parent.iterdir()] == ["this_machine.yaml"]


def test_failed_dump_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "node.yaml"
    dump_node(this_machine(), path)
    before = path.read_text()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        dump_node(load_node("h100_sxm_x1"), path)
    assert path.read_text() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_own_folder_is_searched_first_and_listed(tmp_path):
    write(tmp_path, "gpu", "mine", GPU)
    assert load_gpu("mine", folders=(tmp_path,)).peak.memory_bandwidth_bytes_per_s == 5.0
    assert set(names("gpu", folders=(tmp_path,))) == {*names("gpu"), "mine"}


def test_own_node_may_use_own_and_shipped_parts(tmp_path):
    write(tmp_path, "gpu", "mine", GPU)
    text = "defaults: [/gpu@gpu: mine, /link@host_link: pcie4_x16, _self_]\n"
    write(tmp_path, "node", "mine_x2", text + "name: mine_x2\nnum_gpus: 2\nsource: test\n")
    node = load_node("mine_x2", folders=(tmp_path,))
    assert node.gpu == load_gpu("mine", folders=(tmp_path,))
    assert node.host_link == load_link("pcie4_x16")


def test_unknown_name_says_what_is_near_and_lists_the_known():
    with pytest.raises(ValueError, match=r"gpu='h10_sxm'.*did you mean 'h100_sxm'.*rtx_4090"):
        load_gpu("h10_sxm")
    with pytest.raises(ValueError, match=r"kind='gpus' is not known; there are: gpu, npu"):
        names("gpus")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("memory_bytes: 1000", "memory_byte: 1000", r"'peak.memory_byte' is not in GpuPeak; did"),
        ("  memory_bytes: 1000\n", "", r"key 'peak.memory_bytes' is missing.*a whole number"),
        ("1000", "many", r"key 'peak.memory_bytes' has 'many'; it must be a whole number"),
        ("1000", "true", r"key 'peak.memory_bytes' has True; it must be a whole number"),
        ("1000", "1.5", r"key 'peak.memory_bytes' has 1.5; it must be a whole number"),
        ("1000", "-1", r"memory_bytes=-1 must be positive and finite"),
        ("_per_s: 5", "_per_s: .nan", r"memory_bandwidth_bytes_per_s=nan must be positive"),
        ("fp32: 1e12", "fp31: 1e12", r"dtype 'fp31'; use one of"),
        ("fp32: 1e12", "fp32: 0", r"flops_per_s.fp32=0.0 must be positive"),
        ("this test", "''", r"source='' must not be empty"),
        ("test\npeak", "test\nproxy_of: l40s\npeak", r"proxy_rule=None must be given together"),
        ("name: mine", "name: mine\nname: you", r"key 'name' is given twice"),
        ("name: mine", "defaults: gpu\nname: mine", r"defaults='gpu' must be a list"),
        ("name: mine", "defaults: [/gpu: l20]\nname: mine", r"write '- name'"),
        ("name: mine", "defaults: [/lnk@a: b]\nname: mine", r"lnk='b' is not known"),
        ("name: mine", "defaults: [mine]\nname: mine", r"break the circle"),
        ("name: mine", "name: [", r"is not valid YAML"),
    ],
)
def test_refusal_names_file_and_key(tmp_path, old, new, message):
    assert old in GPU
    path = write(tmp_path, "gpu", "mine", GPU.replace(old, new))
    with pytest.raises(ValueError, match=message) as refusal:
        load_gpu("mine", folders=(tmp_path,))
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_gpus": 2, "gpu": None}, r"num_gpus=2 needs gpu"),
        ({"host_link": None}, r"num_gpus=8 needs host_link"),
        ({"nic_link": None}, r"num_nics=8 needs nic_link"),
        ({"gpu_link": None}, r"gpu_topology=switch with gpu_link=None"),
        ({"gpu_topology": "pcie"}, r"gpu_topology=pcie with gpu_link=nvlink4"),
        ({"gpu_topology": "ring"}, r"'gpu_topology' has 'ring'; use one of switch, pairs, pcie"),
        ({"num_gpus": 0, "gpu": None, "cpu": None}, r"nothing computes"),
        ({"gpu": "h100_sxm"}, r"key 'gpu' has 'h100_sxm'; it must be a block of Gpu keys"),
    ],
)
def test_node_that_cannot_be_built_is_refused(tmp_path, change, message):
    path = tmp_path / "node.yaml"
    dump_node(load_node("h100_sxm_x8"), path)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        read_node(path)


def test_missing_file_is_refused_with_its_path(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.yaml: cannot be read"):
        read_node(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"body_s": [1.0]}, "one value for each"),
        ({"head_tokens": [8.0, 1.0]}, "must increase strictly"),
        ({"coefficients": {"decode_s": 1.0}}, "run the calibration again"),
        ({"heldout_p90_error": -0.1}, "must be zero or more"),
        ({"heldout_median_error": float("nan")}, "heldout_median_error=nan must be zero or more"),
        ({"body_s": [0.1, float("nan")]}, r"body_s\[1\]=nan must be zero or more and finite"),
        ({"head_s": [0.1, float("inf")]}, r"head_s\[1\]=inf must be zero or more and finite"),
        ({"head_s": [-1e-9, 0.1]}, r"head_s\[0\]=-1e-09 must be zero or more"),
        ({"body_tokens": [1.0, float("inf")]}, r"body_tokens\[1\]=inf must be zero or more"),
        ({"body_tokens": [float("nan"), 8.0]}, "must increase strictly"),
        (
            {"coefficients": dict.fromkeys(COEFFICIENTS, float("nan"))},
            r"coefficients\[prefill_pair_s\]=nan must be zero or more and finite",
        ),
    ],
)
def test_fit_that_contradicts_itself_is_refused(change, message):
    fit = this_machine().calibration.models["tiny"]
    with pytest.raises(ValueError, match=message):
        FittedIteration(**vars(fit) | change)


def test_loading_needs_neither_hydra_nor_networkx():
    code = (
        "import sys; from hardware_models.parts import load_node; import hardware_models.topology;"
        "load_node('h100_sxm_x8');"
        "sys.exit(bool({'hydra', 'omegaconf', 'networkx', 'torch', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
