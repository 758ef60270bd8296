"""Ways over the links of real nodes and clusters, by name and as arrays."""

from itertools import pairwise

import numpy as np
import pytest

from hardware_models.parts import load_cluster, load_node, names
from hardware_models.schema import Cluster
from hardware_models.topology import cluster_graph, node_graph
from sim.state.links import Routes

CLUSTERS = {
    "rails": Cluster(
        name="r", node=load_node("h100_sxm_x8"), num_nodes=5, nodes_per_pod=2, source="t"
    ),
    "no rails": Cluster(
        name="n", node=load_node("a800_80g_x8"), num_nodes=4, nodes_per_pod=2, rail_optimized=False,
        oversubscription=4.0, spine_latency_s=1e-6, source="t",
    ),
    "one port": Cluster(name="o", node=load_node("a10g_x8"), num_nodes=2, source="t"),
    **{name: load_cluster(name) for name in names("cluster")},
}  # fmt: skip


@pytest.mark.parametrize("name", CLUSTERS)
def test_rows_of_links_are_the_ways_that_names_give(name):
    routes = Routes(CLUSTERS[name])
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, routes.num_gpus, (2, 300))
    for start, end, row in zip(a, b, routes.gpu_paths(a, b), strict=True):
        way = routes.path(routes.gpu(start), routes.gpu(end))
        assert row[row >= 0].tolist() == way.tolist()


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_way_follows_edges_of_the_graph_with_their_capacity_and_latency(name):
    routes, graph = Routes(CLUSTERS[name]), cluster_graph(CLUSTERS[name])
    rng = np.random.default_rng(1)
    for a, b in rng.integers(0, routes.num_gpus, (50, 2)):
        vertices = routes.router.path(routes.gpu(a), routes.gpu(b))
        assert (vertices[0], vertices[-1]) == (routes.gpu(a), routes.gpu(b))
        for link, pair in zip(routes.links.of_path(vertices), pairwise(vertices), strict=True):
            edge = graph.edges[pair]
            assert routes.links.capacity_bytes_per_s[link] == edge["bandwidth_bytes_per_s"]
            assert routes.links.latency_s[link] == edge["latency_s"]


@pytest.mark.parametrize("name", names("node"))
def test_any_two_gpus_of_a_node_reach_each_other_and_the_host_memory(name):
    routes = Routes(load_node(name))
    count = routes.num_gpus
    for gpu in range(count):
        assert len(routes.path(f"gpu{gpu}", "host_memory"))
        for other in range(count):
            assert (len(routes.path(f"gpu{gpu}", f"gpu{other}")) == 0) == (gpu == other)


def test_directions_are_links_of_their_own_but_for_memory():
    routes = Routes(load_node("h100_sxm_x8"))
    number = routes.links.number
    assert number("gpu0", "pcie0") != number("pcie0", "gpu0")
    assert number("cpu", "host_memory") == number("host_memory", "cpu")
    graph = node_graph(load_node("h100_sxm_x8"))
    assert len(routes.links) == 2 * graph.number_of_edges() - 1


def test_a_disk_reads_and_writes_at_its_own_speeds():
    node = load_node("h100_sxm_x8")
    links = Routes(node).links
    read, write = links.number("disk", "cpu"), links.number("cpu", "disk")
    assert links.capacity_bytes_per_s[read] == node.disk.read_bandwidth_bytes_per_s
    assert links.capacity_bytes_per_s[write] == node.disk.write_bandwidth_bytes_per_s
