"""A node or a cluster as a graph: vertices are devices, edges carry bandwidth and latency.

Vertices: `gpu0`, `gpu_switch`, `pcie0`, `nic0`, `npu`, `cpu`, `host_memory`, `disk`,
`network`; in a cluster all but the network are prefixed with their node, as in `node0/gpu0`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
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


def node_edges(node: Node, prefix: str = "", network_link: Link | None = None) -> list[Edge]:
    """All edges of a node; two sockets count as one `cpu`.

    Args:
        node: what to draw.
        prefix: put before every vertex but `network`.
        network_link: what a port gets from the network; the node's nic_link when None.
    """
    edges = [*_gpu_edges(node), *_pcie_edges(node), *_host_edges(node)]
    edges = [_prefixed(edge, prefix) for edge in edges]
    link = network_link or node.nic_link
    if link is not None:
        edges += [_half(f"{prefix}nic{i}", "network", link) for i in range(node.num_nics)]
    return edges


def node_graph(node: Node) -> "Graph[str]":
    """The node as a networkx graph; edges have kind, bandwidth_bytes_per_s and latency_s."""
    return _graph(node_edges(node))


def cluster_graph(cluster: Cluster) -> "Graph[str]":
    """The cluster as a networkx graph: its nodes around one `network` vertex."""
    edges: list[Edge] = []
    for i in range(cluster.num_nodes):
        edges += node_edges(cluster.node, f"node{i}/", cluster.network_link)
    return _graph(edges)


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
            yield Edge(ends, "memory", memory.bandwidth_bytes_per_s, memory.latency_s or 0.0)
    if disk is not None:
        yield Edge(("cpu", "disk"), "disk", disk.read_bandwidth_bytes_per_s, disk.latency_s)


def _half(device: str, middle: str, link: Link) -> Edge:
    # A link's latency is from device to device; the path through a switch has two edges.
    return _edge((device, middle), link, link.latency_s / 2)


def _edge(ends: tuple[str, str], link: Link, latency_s: float) -> Edge:
    return Edge(ends, link.kind.name, link.bandwidth_bytes_per_s, latency_s)


def _prefixed(edge: Edge, prefix: str) -> Edge:
    ends = (prefix + edge.ends[0], prefix + edge.ends[1])
    return Edge(ends, edge.kind, edge.bandwidth_bytes_per_s, edge.latency_s)


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
