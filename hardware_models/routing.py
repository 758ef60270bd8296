"""The way from one device of a node or cluster to another, as a list of vertices.

Inside a node, GPUs talk over NVLink where a path of NVLink alone joins them, else over PCIe.
Between nodes a GPU sends through its own port (`nic_of`), without a copy in host memory (GPU-
direct RDMA), up to its leaf, over the spine if the other port is on another leaf, and down the
same way.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from hardware_models.schema import Cluster, Node
from hardware_models.topology import leaf_of, nic_of, node_graph

if TYPE_CHECKING:
    from networkx import Graph

OFF_NVLINK = 1000
"""Weight of any other edge: more than the longest way over NVLink."""


class Router:
    """Ways through one node or cluster; the ways inside a node are found once."""

    def __init__(self, hardware: Node | Cluster) -> None:
        self.cluster = hardware if isinstance(hardware, Cluster) else None
        self.node = hardware.node if isinstance(hardware, Cluster) else hardware
        self._graph: Graph[str] = node_graph(self.node)
        self._inside: dict[tuple[str, str], tuple[str, ...]] = {}

    def path(self, source: str, destination: str) -> tuple[str, ...]:
        """The vertices from source to destination, both included.

        Args:
            source: `gpu0`, `host_memory`, `nic1` ...; in a cluster `node0/gpu0` ...
            destination: likewise.

        Raises:
            ValueError: there is no such device, or no link leads there.
        """
        if self.cluster is None:
            return self.inside(source, destination)
        (a, start), (b, end) = self._split(source), self._split(destination)
        if a == b:
            return _of_node(a, self.inside(start, end))
        out, into = self.nic(start), self.nic(end)
        leaves = [leaf_of(self.cluster, a, out), leaf_of(self.cluster, b, into)]
        middle = leaves[:1] if leaves[0] == leaves[1] else [leaves[0], "spine", leaves[1]]
        up = _of_node(a, self.inside(start, f"nic{out}"))
        down = _of_node(b, self.inside(f"nic{into}", end))
        return (*up, *middle, *down)

    def inside(self, source: str, destination: str) -> tuple[str, ...]:
        """The way inside a node, between vertices without the node's name."""
        key = (source, destination)
        if key not in self._inside:
            self._inside[key] = self._search(source, destination)
        return self._inside[key]

    def nic(self, device: str) -> int:
        """The port through which a device of a node sends; all but GPUs use port 0."""
        if device.startswith("nic"):
            return int(device.removeprefix("nic"))
        is_gpu = device.startswith("gpu") and device != "gpu_switch"
        return nic_of(self.node, int(device.removeprefix("gpu")) if is_gpu else 0)

    def _search(self, source: str, destination: str) -> tuple[str, ...]:
        # Here and not above: networkx takes longer to import than a small simulation to run.
        import networkx

        for vertex in (source, destination):
            if vertex not in self._graph:
                raise ValueError(
                    f"{vertex!r} is not in node {self.node.name}; "
                    f"there are: {', '.join(sorted(self._graph))}"
                )
        # Switches and the CPU pass bytes on; a GPU, a port or a memory does not.
        passing = [v for v in self._graph if v in ("gpu_switch", "cpu") or v.startswith("pcie")]
        graph = self._graph.subgraph([*passing, source, destination])
        try:
            path = cast(Any, networkx).shortest_path(graph, source, destination, weight=_weight)
        except networkx.NetworkXNoPath as error:
            raise ValueError(
                f"Node {self.node.name}: no link leads from {source} to {destination}; "
                "join them with gpu_link, host_link or host_memory"
            ) from error
        return tuple(path)

    def _split(self, vertex: str) -> tuple[int, str]:
        node, _, device = vertex.partition("/")
        number = node.removeprefix("node")
        count = self.cluster.num_nodes if self.cluster else 1
        if not (node.startswith("node") and number.isdigit() and device and int(number) < count):
            raise ValueError(
                f"{vertex!r} is no device of a cluster of {count} nodes; write 'node0/gpu0', with "
                f"a node from 0 to {count - 1}"
            )
        return int(number), device


def _of_node(node: int, vertices: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"node{node}/{vertex}" for vertex in vertices)


def _weight(source: str, destination: str, edge: Mapping[str, object]) -> int:
    del source, destination
    return 1 if edge["kind"] == "nvlink" else OFF_NVLINK
