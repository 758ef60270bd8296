"""Networks for tests: given links, and transfers that log when they arrive."""

from dataclasses import dataclass

import numpy as np

from hardware_models.topology import Edge
from sim.processes.exact_time import ExactEnvironment
from sim.processes.network import Network
from sim.state.links import Links


def one_way(index: int, bandwidth: float, latency_s: float = 0.0) -> Edge:
    """An edge of its own; link 2 * index leads forward."""
    return Edge((f"a{index}", f"b{index}"), "test", bandwidth, latency_s)


@dataclass
class Wires:
    """Links that join nothing in particular: tests give paths as rows of link numbers."""

    links: Links

    def path(self, source, destination):
        return np.array([self.links.number(source, destination)])


def network(bandwidths, latencies=None) -> Network:
    """Link i of a test is link 2 i of the network."""
    latencies = latencies or [0.0] * len(bandwidths)
    edges = [one_way(i, *pair) for i, pair in enumerate(zip(bandwidths, latencies, strict=True))]
    return Network(ExactEnvironment(), Wires(Links(edges)))


def rows(*paths):
    width = max(len(path) for path in paths)
    return np.array([[2 * link for link in path] + [-1] * (width - len(path)) for path in paths])


def begin(net: Network, start_s: float, path, num_bytes: float, log: list, name) -> None:
    """Send bytes at an instant and log (name, when they have arrived)."""

    def process():
        yield net.environment.arrival(start_s)
        yield net.send(rows(path), num_bytes)
        log.append((name, net.environment.now))

    net.environment.process(process())
