"""The graph of a node: what is joined to what, and how fast."""

from itertools import pairwise

import networkx
import pytest

from hardware_models.parts import load_cluster, load_node, names
from hardware_models.topology import cluster_graph, node_graph


def latency_s(graph, *path):
    return sum(graph.edges[pair]["latency_s"] for pair in pairwise(path))


@pytest.mark.parametrize("name", names("node"))
def test_node_is_one_piece_and_every_edge_is_complete(name):
    node = load_node(name)
    graph = node_graph(node)
    assert networkx.is_connected(graph)
    assert sum(vertex.startswith("gpu") for vertex in graph if vertex[-1].isdigit()) == (
        node.num_gpus
    )
    for _, _, edge in graph.edges(data=True):
        assert edge["bandwidth_bytes_per_s"] > 0
        assert edge["latency_s"] >= 0
        assert edge["kind"]


def test_switched_gpus_meet_in_the_switch_at_the_latency_of_the_link():
    node = load_node("h100_sxm_x8")
    graph = node_graph(node)
    path = networkx.shortest_path(graph, "gpu0", "gpu7")
    assert path == ["gpu0", "gpu_switch", "gpu7"]
    assert graph.edges["gpu0", "gpu_switch"]["bandwidth_bytes_per_s"] == 450e9
    assert latency_s(graph, *path) == pytest.approx(node.gpu_link.latency_s)


def test_bridged_pairs_are_joined_directly_and_others_over_pcie():
    graph = node_graph(load_node("a40_x4"))
    assert graph.has_edge("gpu0", "gpu1")
    assert graph.has_edge("gpu2", "gpu3")
    assert not graph.has_edge("gpu1", "gpu2")
    assert networkx.shortest_path(graph, "gpu1", "gpu2") == [
        "gpu1",
        "pcie0",
        "cpu",
        "pcie1",
        "gpu2",
    ]


def test_gpus_share_the_uplink_of_their_pcie_switch():
    graph = node_graph(load_node("a800_80g_x8"))
    assert set(graph["pcie0"]) == {"gpu0", "gpu1", "nic0", "cpu"}
    assert set(graph["network"]) == {"nic0", "nic1", "nic2", "nic3"}
    assert set(graph["cpu"]) == {"pcie0", "pcie1", "pcie2", "pcie3", "host_memory", "disk"}


def test_phone_shares_one_memory():
    assert set(node_graph(load_node("redmi_k70_pro"))["host_memory"]) == {"cpu", "npu"}


def test_single_gpu_has_no_switch():
    assert "gpu_switch" not in node_graph(load_node("h100_sxm_x1"))


def test_cluster_meets_in_the_network():
    cluster = load_cluster("a800_80g_x8_by_2")
    graph = cluster_graph(cluster)
    assert networkx.is_connected(graph)
    assert len(graph["network"]) == 2 * cluster.node.num_nics
    path = networkx.shortest_path(graph, "node0/nic0", "node1/nic0")
    assert path == ["node0/nic0", "network", "node1/nic0"]
    assert latency_s(graph, *path) == pytest.approx(cluster.node.nic_link.latency_s)
