"""The same files under Hydra: records are structured-config schemas, and nodes compose alike."""

from dataclasses import dataclass

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException
from omegaconf import MISSING, OmegaConf

from hardware_models.composition import SHIPPED
from hardware_models.parts import KINDS, dump_node, load_cluster, load_node, names, read_part
from hardware_models.schema import Cluster, Node

LEAVES = [(k, n) for k in KINDS if k not in ("node", "cluster") for n in names(k)]


@dataclass
class Study:
    node: Node = MISSING


@pytest.fixture
def hydra():
    ConfigStore.instance().store(name="hardware_test_study", node=Study)
    with initialize_config_dir(str(SHIPPED), version_base="1.3"):
        yield
    GlobalHydra.instance().clear()


@pytest.mark.parametrize(("kind", "name"), LEAVES)
def test_part_merges_into_its_schema(kind, name):
    path = SHIPPED / kind / f"{name}.yaml"
    merged = OmegaConf.merge(OmegaConf.structured(KINDS[kind]), OmegaConf.load(path))
    assert OmegaConf.to_object(merged) == read_part(kind, path)


@pytest.mark.parametrize("record", [Node, Cluster])
def test_composed_records_are_schemas(record):
    assert OmegaConf.is_missing(OmegaConf.structured(record), "name")


@pytest.mark.parametrize("name", names("node"))
def test_hydra_composes_the_same_node(hydra, name):
    study = OmegaConf.to_object(compose("hardware_test_study", overrides=[f"+node={name}"]))
    assert study.node == load_node(name)


def test_hydra_composes_without_a_schema(hydra):
    composed = compose(overrides=["+node=h100_sxm_x8"])
    merged = OmegaConf.merge(OmegaConf.structured(Node), composed.node)
    assert OmegaConf.to_object(merged) == load_node("h100_sxm_x8")


def test_hydra_composes_the_same_cluster(hydra):
    composed = compose(overrides=["+cluster=h800_sxm_x8_by_16"])
    merged = OmegaConf.merge(OmegaConf.structured(Cluster), composed.cluster)
    assert OmegaConf.to_object(merged) == load_cluster("h800_sxm_x8_by_16")


def test_a_part_of_a_node_can_be_swapped_on_the_command_line(hydra):
    overrides = ["+node=h100_sxm_x8", "link@node.gpu_link=nvlink4_h800", "node.num_gpus=4"]
    study = OmegaConf.to_object(compose("hardware_test_study", overrides=overrides))
    assert study.node.gpu_link == load_node("h800_sxm_x8").gpu_link
    assert study.node.num_gpus == 4


def test_package_path_is_found_from_a_folder_elsewhere(tmp_path):
    (tmp_path / "study.yaml").write_text("defaults: [node: l40s_x2, _self_]\n")
    search = "hydra.searchpath=[pkg://hardware_models]"
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        composed = compose("study", overrides=[search])
    assert composed.node.gpu.name == "l40s"


def test_dumped_node_is_read_by_hydra(tmp_path):
    dump_node(load_node("a40_x4"), tmp_path / "node" / "mine.yaml")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        composed = compose(overrides=["+node=mine"])
    merged = OmegaConf.merge(OmegaConf.structured(Node), composed.node)
    assert OmegaConf.to_object(merged) == load_node("a40_x4")


def test_typo_is_refused_with_its_key(hydra):
    with pytest.raises(ConfigCompositionException, match="num_gpu"):
        compose("hardware_test_study", overrides=["+node=h100_sxm_x8", "node.num_gpu=4"])
