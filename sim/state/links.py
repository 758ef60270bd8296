"""Directed links of a node or cluster as arrays, and the way of every flow as a row of links.

Links carry numbers: those of node 0 first, in the order of its edges, then those of node 1 in the
same order, and the spine last; so the ways inside node n are those inside node 0 plus a constant.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hardware_models.routing import Router
from hardware_models.schema import Cluster, Node
from hardware_models.topology import Edge, cluster_edges, leaf_of, node_edges

IntArray = NDArray[np.intp]
FloatArray = NDArray[np.float64]
NO_LINK = -1
"""Fills a row of links behind its last one."""


class Links:
    """Capacity and latency of every directed link; a shared one serves both of its directions."""

    def __init__(self, edges: Sequence[Edge]) -> None:
        self.index: dict[tuple[str, str], int] = {}
        capacity: list[float] = []
        latency: list[float] = []
        for edge in edges:
            there, back = edge.ends, (edge.ends[1], edge.ends[0])
            self.index[there] = len(capacity)
            capacity.append(edge.back_bandwidth_bytes_per_s or edge.bandwidth_bytes_per_s)
            if not edge.shared:
                capacity.append(edge.bandwidth_bytes_per_s)
            self.index[back] = len(capacity) - 1
            latency += [edge.latency_s] * (len(capacity) - len(latency))
        self.capacity_bytes_per_s: FloatArray = np.array(capacity)
        self.latency_s: FloatArray = np.array(latency)

    def __len__(self) -> int:
        return len(self.capacity_bytes_per_s)

    def number(self, source: str, destination: str) -> int:
        """The number of the link from one vertex to its neighbour.

        Raises:
            ValueError: no link joins them.
        """
        number = self.index.get((source, destination))
        if number is None:
            near = sorted(end for start, end in self.index if start == source)
            raise ValueError(
                f"no link leads from {source!r} to {destination!r}; "
                f"links from there lead to: {', '.join(near) or 'nowhere'}"
            )
        return number

    def of_path(self, vertices: Sequence[str]) -> list[int]:
        """The links along a path of vertices."""
        return [self.number(*pair) for pair in pairwise(vertices)]


class Routes:
    """The links of a node or cluster, and the ways over them."""

    def __init__(self, hardware: Node | Cluster) -> None:
        self.router = Router(hardware)
        self.cluster = self.router.cluster
        self.node = self.router.node
        edges = node_edges(self.node) if self.cluster is None else cluster_edges(self.cluster)
        self.links = Links(edges)
        self.num_nodes = 1 if self.cluster is None else self.cluster.num_nodes
        self.num_gpus = self.num_nodes * self.node.num_gpus
        self._inside = self._ways_inside()
        if self.cluster is not None and self.num_nodes > 1:
            self._between(self.cluster)

    def gpu(self, rank: int) -> str:
        """The vertex of a GPU by its rank: rank r is GPU r mod n of node r div n."""
        if not 0 <= rank < self.num_gpus:
            raise ValueError(f"rank={rank} must be from 0 to {self.num_gpus - 1}")
        node, local = divmod(rank, self.node.num_gpus)
        return f"gpu{local}" if self.cluster is None else f"node{node}/gpu{local}"

    def path(self, source: str, destination: str) -> IntArray:
        """The links from one device to another, by their vertices.

        Raises:
            ValueError: there is no such device, or no link leads there.
        """
        return np.array(self.links.of_path(self.router.path(source, destination)), np.intp)

    def gpu_paths(self, sources: ArrayLike, destinations: ArrayLike) -> IntArray:
        """The links from GPU to GPU, by rank: a row each, filled up with `NO_LINK`."""
        start, end = np.asarray(sources, np.intp), np.asarray(destinations, np.intp)
        for ranks in (start, end):
            if ranks.size and not 0 <= ranks.min() <= ranks.max() < self.num_gpus:
                last = self.num_gpus - 1
                raise ValueError(
                    f"ranks from {ranks.min()} to {ranks.max()} must be from 0 to {last}"
                )
        per_node = self.node.num_gpus
        a, b = start // per_node, end // per_node
        inside = self._inside[start % per_node, end % per_node]
        inside = _shifted(inside, a * self._links_per_node)
        if np.array_equal(a, b):
            return inside
        out, into = self._up[start], self._down[end]
        spine = np.stack([self._leaf_up[self._leaf[start]], self._leaf_down[self._leaf[end]]], 1)
        spine[self._leaf[start] == self._leaf[end]] = NO_LINK
        rows = np.concatenate([out, spine, into], axis=1)
        here = (a == b)[:, None]
        width = max(inside.shape[1], rows.shape[1])
        return np.where(here, widened(inside, width), widened(rows, width))

    @property
    def _links_per_node(self) -> int:
        if self.num_nodes < 2:
            return 0
        return self.links.number("node1/gpu0", "node1/pcie0") - self.links.number(
            "node0/gpu0", "node0/pcie0"
        )

    def _ways_inside(self) -> IntArray:
        """Rows of links between any two GPUs of node 0."""
        count = self.node.num_gpus
        prefix = "" if self.cluster is None else "node0/"
        ways = [
            self.links.of_path([prefix + v for v in self.router.inside(f"gpu{i}", f"gpu{j}")])
            for i in range(count)
            for j in range(count)
        ]
        rows = _padded(ways)
        return rows.reshape(count, count, rows.shape[1])

    def _between(self, cluster: Cluster) -> None:
        """Rows of links from every GPU to its leaf and back, and between leaves and spine."""
        leaves: dict[str, int] = {}
        up: list[list[int]] = []
        down: list[list[int]] = []
        leaf: list[int] = []
        for rank in range(self.num_gpus):
            node, local = divmod(rank, self.node.num_gpus)
            nic = self.router.nic(f"gpu{local}")
            name = leaf_of(cluster, node, nic)
            inside = self.router.inside(f"gpu{local}", f"nic{nic}")
            way = [*(f"node{node}/{vertex}" for vertex in inside), name]
            up.append(self.links.of_path(way))
            down.append(self.links.of_path(way[::-1]))
            leaf.append(leaves.setdefault(name, len(leaves)))
        index = self.links.index
        self._up, self._down, self._leaf = _padded(up), _padded(down), np.array(leaf, np.intp)
        self._leaf_up = np.array([index.get((name, "spine"), NO_LINK) for name in leaves], np.intp)
        self._leaf_down = np.array([index.get(("spine", n), NO_LINK) for n in leaves], np.intp)


def _padded(ways: Sequence[Sequence[int]]) -> IntArray:
    rows = np.full((len(ways), max((len(way) for way in ways), default=0)), NO_LINK, np.intp)
    for row, way in zip(rows, ways, strict=True):
        row[: len(way)] = way
    return rows


def widened(rows: IntArray, width: int) -> IntArray:
    """Rows of links with `NO_LINK` behind, up to a width."""
    if rows.shape[1] >= width:
        return rows
    wide = np.full((len(rows), width), NO_LINK, np.intp)
    wide[:, : rows.shape[1]] = rows
    return wide


def _shifted(rows: IntArray, by: IntArray) -> IntArray:
    return np.where(rows == NO_LINK, NO_LINK, rows + by[:, None])
