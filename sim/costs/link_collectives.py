# pyright: basic
"""Collectives from datasheet links, and what NCCL makes of them: one fit for all operations.

scipy comes without complete types.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hardware_models.schema import Cluster, Node
from sim.costs.alpha_beta import ALGORITHMS, Group, Hop, collective_s, group_of
from sim.costs.collective_tables import Estimate, Measured, Source


@dataclass(frozen=True, slots=True)
class Library:
    """What a library of collectives makes of any link."""

    launch_s: float
    """Once a collective."""
    step_s: float
    """For each step inside a node, instead of the latency that the link's part states."""
    bandwidth_share: float
    """Of the datasheet bandwidth of every link."""


NCCL = Library(launch_s=11.02e-6, step_s=0.797e-6, bandwidth_share=0.547)
"""`fit_library` on NCCL 2.27.3 on A100 alone: aiconfigurator-core 0.12, fp16, 2, 4 and 8 ranks."""


class LinkCollectives:
    """The cost of collectives among GPUs of which nothing was measured.

    Between nodes a step takes the latency of its links as their parts state it, which is assumed.
    """

    def __init__(self, hardware: Node | Cluster, library: Library = NCCL) -> None:
        self.hardware = hardware
        self.library = library
        self._groups: dict[tuple[int, int], Group] = {}

    def seconds(
        self, operation: str, num_ranks: int, payload_bytes: float, num_nodes: int = 1
    ) -> Estimate:
        """Seconds of one collective; see `CollectiveCost`.

        Raises:
            ValueError: the operation is not known, or there are not so many GPUs.
        """
        key = (num_ranks, num_nodes)
        if key not in self._groups:
            library = self.library
            share = library.bandwidth_share
            group = group_of(self.hardware, num_ranks, num_nodes, share=share)
            inside = replace(group.inside, latency_s=library.step_s)
            self._groups[key] = replace(group, inside=inside, launch_s=library.launch_s)
        seconds = collective_s(operation, payload_bytes, self._groups[key])
        return Estimate(seconds, Source.datasheet)


def fit_library(node: Node, rows: Sequence[Measured]) -> Library:
    """What a library makes of a node's links: the least relative squared errors over all rows.

    Args:
        node: whose links the datasheet knows.
        rows: measured on it, inside one node.
    """
    from scipy.optimize import nnls  # only whoever fits waits for it

    features: list[tuple[float, float, float]] = []
    measured_s: list[float] = []
    for row in rows:
        if row.num_nodes == 1 and row.operation in ALGORITHMS:
            group = group_of(node, row.num_ranks)
            steps = collective_s(row.operation, 0, replace(group, inside=Hop(1.0, np.inf)))
            moving = replace(group.inside, latency_s=0.0)
            moving_s = collective_s(row.operation, row.payload_bytes, replace(group, inside=moving))
            features.append((1.0, steps, moving_s))
            measured_s.append(row.seconds)
    relative = np.array(features) / np.array(measured_s)[:, None]
    scale = relative.max(axis=0)
    found = np.asarray(nnls(relative / scale, np.ones(len(relative)))[0] / scale, np.float64)
    launch_s, step_s, slowdown = (float(value) for value in found)
    return Library(launch_s, step_s, 1 / slowdown)
