"""The graph of a node: what is joined to what, and how fast."""

from itertools import pairwise

import networkx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware_models.parts import load_cluster, load_node, names
from hardware_models.routing import Router
from hardware_models.schema import Cluster, GpuTopology, Node
from hardware_models.topology import cluster_graph, nic_of, node_graph


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


def cluster_of(node, **changes):
    return Cluster(name="c", node=load_node(node), source="test", **changes)


def test_ports_of_one_rail_meet_in_their_leaf():
    cluster = load_cluster("a800_80g_x8_by_2")
    graph = cluster_graph(cluster)
    assert networkx.is_connected(graph)
    assert set(graph["pod0/leaf3"]) == {"node0/nic3", "node1/nic3", "spine"}
    path = networkx.shortest_path(graph, "node0/nic0", "node1/nic0")
    assert path == ["node0/nic0", "pod0/leaf0", "node1/nic0"]
    assert latency_s(graph, *path) == pytest.approx(cluster.node.nic_link.latency_s)


def test_pods_have_leaves_of_their_own_and_meet_in_the_spine():
    graph = cluster_graph(cluster_of("h100_sxm_x8", num_nodes=5, nodes_per_pod=2))
    assert len(graph["spine"]) == 3 * 8
    assert set(graph["pod2/leaf0"]) == {"node4/nic0", "spine"}
    flat = cluster_graph(
        cluster_of("h100_sxm_x8", num_nodes=5, nodes_per_pod=2, rail_optimized=False)
    )
    assert set(flat["spine"]) == {"pod0/leaf0", "pod1/leaf0", "pod2/leaf0"}
    assert len(flat["pod0/leaf0"]) == 2 * 8 + 1


def test_a_single_leaf_needs_no_spine():
    assert "spine" not in cluster_graph(cluster_of("a10g_x8", num_nodes=3))


@pytest.mark.parametrize("ratio", [1.0, 3.0])
def test_a_leaf_has_its_nodes_bandwidth_over_the_oversubscription_to_the_spine(ratio):
    cluster = cluster_of("h100_sxm_x8", num_nodes=4, nodes_per_pod=2, oversubscription=ratio)
    edge = cluster_graph(cluster).edges["pod1/leaf5", "spine"]
    assert edge["bandwidth_bytes_per_s"] == pytest.approx(2 * 50e9 / ratio)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"oversubscription": 0.5}, r"oversubscription=0.5 must be 1 or more.*1 is non-blocking"),
        ({"oversubscription": float("nan")}, r"oversubscription=nan must be positive"),
        ({"nodes_per_pod": 9}, r"nodes_per_pod=9 must be at most num_nodes=4; leave it out"),
        ({"nodes_per_pod": 0}, r"nodes_per_pod=0 must be positive"),
        ({"spine_latency_s": -1.0}, r"spine_latency_s=-1.0 must be zero or more"),
    ],
)
def test_a_fabric_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        cluster_of("h100_sxm_x8", num_nodes=4, **changes)


def test_nodes_that_their_links_do_not_connect_are_refused():
    node = load_node("h100_sxm_x8")
    with pytest.raises(ValueError, match=r"num_nics=8 needs host_link"):
        Node(**vars(node) | {"gpu": None, "num_gpus": 0, "gpu_link": None, "host_link": None,
                             "gpu_topology": GpuTopology.pcie})  # fmt: skip
    phone = load_node("redmi_k70_pro")
    with pytest.raises(ValueError, match=r"npu=hexagon_8gen3 with host_memory=None.*main memory"):
        Node(**vars(phone) | {"host_memory": None})


PARTS = ("gpu", "npu", "cpu", "host_memory", "host_link", "nic_link", "disk", "gpu_link")


@given(st.data())
def test_whatever_node_is_accepted_is_one_piece(data):
    full = vars(load_node("h100_sxm_x8")) | {"npu": load_node("redmi_k70_pro").npu}
    fields = {
        key: value for key, value in full.items() if key not in PARTS or data.draw(st.booleans())
    }
    fields |= {name: data.draw(st.integers(0, 5)) for name in ("num_gpus", "num_nics")}
    fields |= {"gpu_topology": data.draw(st.sampled_from(GpuTopology))}
    try:
        node = Node(**fields)
    except ValueError:
        return
    graph = node_graph(node)
    assert len(graph) == 0 or networkx.is_connected(graph)
    devices = {f"gpu{i}" for i in range(node.num_gpus)} | {f"nic{i}" for i in range(node.num_nics)}
    devices |= {"npu"} if node.npu and node.cpu else set()
    assert node.num_gpus + node.num_nics == 0 or devices <= set(graph)


def test_a_gpu_sends_through_its_own_port_and_over_the_spine_to_another_rail():
    router = Router(cluster_of("h100_sxm_x8", num_nodes=2))
    up = ("node0/gpu3", "node0/pcie3", "node0/nic3", "pod0/leaf3")
    assert router.path("node0/gpu3", "node1/gpu3") == (
        *up, "node1/nic3", "node1/pcie3", "node1/gpu3"
    )  # fmt: skip
    assert router.path("node0/gpu3", "node1/gpu5") == (
        *up, "spine", "pod0/leaf5", "node1/nic5", "node1/pcie5", "node1/gpu5"
    )  # fmt: skip


def test_gpus_that_share_a_port_share_its_pcie_switch():
    node = load_node("a800_80g_x8")
    assert [nic_of(node, gpu) for gpu in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    router = Router(node)
    for gpu in range(8):
        assert len(router.path(f"gpu{gpu}", f"nic{nic_of(node, gpu)}")) == 3


def test_nvlink_is_taken_where_it_joins_and_no_gpu_passes_bytes_on():
    router = Router(load_node("a40_x8"))
    assert router.path("gpu2", "gpu3") == ("gpu2", "gpu3")
    assert router.path("gpu1", "gpu2") == ("gpu1", "pcie0", "cpu", "pcie1", "gpu2")
    switched = Router(load_node("a100_80g_x8"))  # gpu0 and gpu1 also share a PCIe switch
    assert switched.path("gpu0", "gpu1") == ("gpu0", "gpu_switch", "gpu1")


@pytest.mark.parametrize("vertex", ["gpu0", "node9/gpu0", "node1/", "nodex/gpu0"])
def test_a_device_that_is_not_in_the_cluster_is_refused(vertex):
    router = Router(cluster_of("h100_sxm_x8", num_nodes=2))
    with pytest.raises(
        ValueError, match=r"is no device of a cluster of 2 nodes; write 'node0/gpu0'"
    ):
        router.path("node0/gpu0", vertex)


def test_a_gpu_without_a_port_reaches_no_other_node():
    with pytest.raises(ValueError, match=r"num_nics=0: gpu1 reaches no other node"):
        nic_of(load_node("rtx_4090_x8"), 1)
