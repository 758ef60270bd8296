"""A node or a cluster as a graph: vertices are devices, edges carry bandwidth and latency.

Vertices: `gpu0`, `gpu_switch`, `pcie0`, `nic0`, `npu`, `cpu`, `host_memory`, `disk`, and `network`
where the ports of a single node end. In a cluster they carry their node, as in `node0/gpu0`, and
ports end in leaf switches, `pod0/leaf3`, which meet in one `spine`: as many spine switches as
there may be, over which flows spread evenly.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from hardware_models.schema import Cluster, GpuTopology, Link, Node

if TYPE_CHECKING:
    from networkx import Graph


@dataclass(frozen=True, slots=True)
class Edge:
    """One link of the graph, usable in both directions at once."""

    ends: tuple[str, str]
    """The two vertices that it joins."""
    kind: str
    """What it is: nvlink, pcie, infiniband, ethernet, memory or disk."""
    bandwidth_bytes_per_s: float
    """Bandwidth in one direction, bytes/s; of a disk, its reading."""
    latency_s: float
    """Latency, seconds; 0 where the part does not state one."""
    back_bandwidth_bytes_per_s: float | None = None
    """From the first end to the second where that differs, bytes/s: writing to a disk."""
    shared: bool = False
    """Both directions draw on one bandwidth, as reads and writes of a memory do."""


def node_edges(node: Node) -> list[Edge]:
    """All edges of a node; two sockets count as one `cpu`."""
    edges = [*_gpu_edges(node), *_pcie_edges(node), *_host_edges(node)]
    if node.nic_link is not None:
        edges += [_half(f"nic{i}", "network", node.nic_link) for i in range(node.num_nics)]
    return edges


def cluster_edges(cluster: Cluster) -> list[Edge]:
    """All edges: node by node, each node's in the order of `node_edges`; then the spine."""
    inside = [edge for edge in node_edges(cluster.node) if "network" not in edge.ends]
    edges: list[Edge] = []
    for n in range(cluster.num_nodes):
        edges += [_prefixed(edge, f"node{n}/") for edge in inside]
        if (port := cluster.network_link) is not None:
            for i in range(cluster.node.num_nics):
                edges.append(_half(f"node{n}/nic{i}", leaf_of(cluster, n, i), port))
    return [*edges, *_spine_edges(cluster)]


def leaf_of(cluster: Cluster, node: int, nic: int) -> str:
    """The leaf switch that a port of a node ends in."""
    pod = node // (cluster.nodes_per_pod or cluster.num_nodes)
    return f"pod{pod}/leaf{nic if cluster.rail_optimized else 0}"


def nic_of(node: Node, gpu: int) -> int:
    """The port that a GPU sends through: its share of the ports, in order, which are nearest.

    Raises:
        ValueError: the node has no port.
    """
    if node.num_nics == 0:
        raise ValueError(
            f"Node {node.name}: num_nics=0: gpu{gpu} reaches no other node; give it ports"
        )
    return gpu * node.num_nics // max(1, node.num_gpus)


def node_graph(node: Node) -> "Graph[str]":
    """The node as a networkx graph; edges have kind, bandwidth_bytes_per_s and latency_s."""
    return _graph(node_edges(node))


def cluster_graph(cluster: Cluster) -> "Graph[str]":
    """The cluster as a networkx graph: its nodes, leaf switches and the spine."""
    return _graph(cluster_edges(cluster))


def _spine_edges(cluster: Cluster) -> Iterator[Edge]:
    port = cluster.network_link
    leaves = cluster.leaves_per_pod
    if port is None or cluster.num_pods * leaves < 2:
        return
    for pod in range(cluster.num_pods):
        size = cluster.nodes_per_pod or cluster.num_nodes
        nodes = min(size, cluster.num_nodes - pod * size)
        ports = nodes * cluster.node.num_nics // leaves
        uplink = ports * port.bandwidth_bytes_per_s / cluster.oversubscription
        for leaf in range(leaves):
            ends = (f"pod{pod}/leaf{leaf}", "spine")
            yield Edge(ends, port.kind.name, uplink, cluster.spine_latency_s / 2)


def _gpu_edges(node: Node) -> Iterator[Edge]:
    link = node.gpu_link
    if link is None or node.num_gpus < 2:
        return
    if node.gpu_topology is GpuTopology.switch:
        for i in range(node.num_gpus):
            yield _half(f"gpu{i}", "gpu_switch", link)
    else:
        for i in range(0, node.num_gpus - 1, 2):
            yield _edge((f"gpu{i}", f"gpu{i + 1}"), link, link.latency_s)


def _pcie_edges(node: Node) -> Iterator[Edge]:
    link = node.host_link
    if link is None:
        return
    num_switches = max(1, -(-node.num_gpus // node.gpus_per_pcie_switch))
    for i in range(node.num_gpus):
        yield _half(f"gpu{i}", f"pcie{i // node.gpus_per_pcie_switch}", link)
    for i in range(node.num_nics):
        yield _half(f"nic{i}", f"pcie{i * num_switches // node.num_nics}", link)
    if node.num_gpus + node.num_nics:
        for i in range(num_switches):
            yield _half(f"pcie{i}", "cpu", link)


def _host_edges(node: Node) -> Iterator[Edge]:
    memory, disk = node.host_memory, node.disk
    if memory is not None:
        for chip in ("cpu", "npu") if node.npu is not None else ("cpu",):
            ends = (chip, "host_memory")
            bandwidth, latency_s = memory.bandwidth_bytes_per_s, memory.latency_s or 0.0
            yield Edge(ends, "memory", bandwidth, latency_s, shared=True)
    if disk is not None:
        read, write = disk.read_bandwidth_bytes_per_s, disk.write_bandwidth_bytes_per_s
        yield Edge(("cpu", "disk"), "disk", read, disk.latency_s, back_bandwidth_bytes_per_s=write)


def _half(device: str, middle: str, link: Link) -> Edge:
    # A link's latency is from device to device; the path through a switch has two edges.
    return _edge((device, middle), link, link.latency_s / 2)


def _edge(ends: tuple[str, str], link: Link, latency_s: float) -> Edge:
    return Edge(ends, link.kind.name, link.bandwidth_bytes_per_s, latency_s)


def _prefixed(edge: Edge, prefix: str) -> Edge:
    return replace(edge, ends=(prefix + edge.ends[0], prefix + edge.ends[1]))


def _graph(edges: list[Edge]) -> "Graph[str]":
    # Here and not above: networkx takes longer to import than a small simulation to run.
    import networkx

    graph: Any = cast(Any, networkx).Graph()
    for edge in edges:
        graph.add_edge(
            *edge.ends,
            kind=edge.kind,
            bandwidth_bytes_per_s=edge.bandwidth_bytes_per_s,
            latency_s=edge.latency_s,
        )
    return graph
