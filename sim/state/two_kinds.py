"""Nodes of two kinds around one non-blocking switch, as links that transfers share.

Senders come first, receivers after them. The ports of a node are one link in either direction.
"""

import numpy as np
from numpy.typing import ArrayLike

from hardware_models.topology import Edge
from sim.state.links import IntArray, Links

SWITCH = "switch"


class TwoKinds:
    """A `Wiring` of nodes by number."""

    def __init__(
        self, counts: tuple[int, int], bytes_per_s: tuple[float, float], latency_s: float
    ) -> None:
        """Join them.

        Args:
            counts: nodes of the first kind and of the second.
            bytes_per_s: of a node of either kind, in each direction.
            latency_s: from any node to any other.
        """
        self.counts = counts
        self.num_nodes = sum(counts)
        rates = [rate for rate, count in zip(bytes_per_s, counts, strict=True) for _ in [0] * count]
        self.links = Links(
            [
                Edge((f"node{node}", SWITCH), "network", rate, latency_s / 2)
                for node, rate in enumerate(rates)
            ]
        )
        index = self.links.index
        self._up = np.array([index[f"node{n}", SWITCH] for n in range(self.num_nodes)], np.intp)
        self._down = np.array([index[SWITCH, f"node{n}"] for n in range(self.num_nodes)], np.intp)

    def path(self, source: str, destination: str) -> IntArray:
        """The two links between two nodes, by their vertices."""
        return np.array(self.links.of_path([source, SWITCH, destination]), np.intp)

    def gpu_paths(self, sources: ArrayLike, destinations: ArrayLike) -> IntArray:
        """The links from node to node, by number: a row each."""
        start, end = np.asarray(sources, np.intp), np.asarray(destinations, np.intp)
        return np.stack([self._up[start], self._down[end]], axis=-1)
