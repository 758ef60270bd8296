"""Collectives as flows over a network, step by step, as `sim/costs/alpha_beta.py` counts them.

A step begins when every message of the step before has arrived. On an idle symmetric network both
agree; on any other this is what contention makes of it.
"""

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from simpy.events import Event

from sim.costs.alpha_beta import known_algorithm
from sim.processes.network import Network

Ranks = NDArray[np.intp]
Step = tuple[Ranks, Ranks, float]
"""Who sends to whom, and how many bytes each."""


class Collectives:
    """Collectives among some GPUs of a network, the same number on every node."""

    def __init__(self, network: Network, ranks: Sequence[int], ranks_per_node: int) -> None:
        """Take the members.

        Args:
            network: carries the messages.
            ranks: GPUs of the network, node by node.
            ranks_per_node: how many of them are on each node.

        Raises:
            ValueError: the ranks do not fill whole nodes, or one comes twice.
        """
        if ranks_per_node < 1 or not ranks or len(ranks) % ranks_per_node:
            raise ValueError(
                f"{len(ranks)} ranks do not make nodes of ranks_per_node={ranks_per_node}; give as "
                "many ranks on every node"
            )
        if len(set(ranks)) != len(ranks):
            raise ValueError(f"ranks={list(ranks)} name a GPU twice; give every rank once")
        self.network = network
        self.grid: Ranks = np.array(ranks, np.intp).reshape(-1, ranks_per_node)
        """Shape: nodes, ranks of a node."""

    def run(
        self, operation: str, payload_bytes: float, algorithm: str | None = None
    ) -> Generator[Event, Any, None]:
        """One collective, as a SimPy process.

        Args:
            operation: as in `sim/costs/alpha_beta.py`, as are the other two.
            payload_bytes: the larger of one rank's input and output.
            algorithm: None: the default.

        Raises:
            ValueError: the operation or algorithm is not known, or the payload is negative.
        """
        chosen = known_algorithm(operation, algorithm)
        if not payload_bytes >= 0:
            raise ValueError(f"payload_bytes={payload_bytes} must be zero or more; give bytes")
        if (operation, chosen) == ("broadcast", "chain"):
            yield from self._chain(payload_bytes)
            return
        for sources, destinations, num_bytes in self._steps(operation, chosen, payload_bytes):
            yield self.network.transfer_all(sources, destinations, num_bytes)

    def all_to_all_uneven(self, sent_bytes: ArrayLike) -> Event:
        """Every rank sends every other rank its own number of bytes, all at once.

        Args:
            sent_bytes: from rank (row) to rank (column), as they stand in `ranks`.
                Shape: ranks, ranks.
        """
        sent = np.asarray(sent_bytes, np.float64)
        count = self.grid.size
        if sent.shape != (count, count):
            raise ValueError(f"sent_bytes has shape {sent.shape}; it must be {(count, count)}")
        rows, columns = np.nonzero(~np.eye(count, dtype=np.bool_) & (sent > 0))
        ranks = self.grid.ravel()
        return self.network.transfer_all(ranks[rows], ranks[columns], sent[rows, columns])

    def _steps(self, operation: str, algorithm: str, payload: float) -> Iterator[Step]:
        nodes, near = self.grid.shape
        share, piece = payload / near, payload / near / nodes
        inside, between = self.grid, self.grid.T
        ranks = self.grid.reshape(1, -1)
        if algorithm == "ring":
            if operation in ("all_reduce", "reduce_scatter"):
                yield from _ring(inside, share)
                yield from _ring(between, piece)
            if operation in ("all_reduce", "all_gather"):
                yield from _ring(between, piece)
                yield from _ring(inside, share)
        elif algorithm == "tree":
            heads = self.grid[:, 0].reshape(1, -1)
            down = [*_tree(heads, payload), *_tree(inside, payload)]
            if operation == "all_reduce":
                yield from [(to, by, size) for by, to, size in reversed(down)]
            yield from down
        elif operation == "all_to_all":
            steps = _pairwise(ranks, payload / ranks.size)
            yield from steps if algorithm == "pairwise" else _at_once(list(steps))
        elif ranks.size > 1:
            yield ranks[0, :1], ranks[0, -1:], payload

    def _chain(self, payload: float) -> Generator[Event, Any, None]:
        """All ranks pass the vector on at once; the last has it when it has come all the way."""
        heads = self.grid[:, 0]
        sources = np.concatenate([heads[:-1], self.grid[:, :-1].ravel()])
        destinations = np.concatenate([heads[1:], self.grid[:, 1:].ravel()])
        if not len(sources):
            return
        began_s = self.network.environment.now
        yield self.network.transfer_all(sources, destinations, payload)
        passed_s = self.network.environment.now - began_s
        rows = self.network.wiring.gpu_paths(sources, destinations)
        latency_s = self.network.latency_s(rows)
        # Each piece takes the latency of every hop; the transfer took that of the longest already.
        nodes = len(heads) - 1
        way_s = latency_s[:nodes].sum() + latency_s[nodes:].reshape(len(heads), -1).sum(1).max()
        more_s = float(way_s - latency_s.max())
        yield self.network.environment.boundary(began_s + passed_s + more_s)


def _ring(groups: Ranks, num_bytes: float) -> Iterator[Step]:
    """Every rank of a group (a row) passes a piece to the next, until all pieces went round."""
    nexts = np.roll(groups, -1, axis=1)
    for _ in range(groups.shape[1] - 1):
        yield groups.ravel(), nexts.ravel(), num_bytes


def _tree(groups: Ranks, num_bytes: float) -> list[Step]:
    """From the first of every row to all: who has the vector gives it to one who has not."""
    count = groups.shape[1]
    steps: list[Step] = []
    distance = 1 << (count - 1).bit_length()
    while distance > 1:
        distance //= 2
        by = groups[:, : count - distance : 2 * distance]
        to = groups[:, distance :: 2 * distance]
        steps.append((by.ravel(), to.ravel(), num_bytes))
    return steps


def _pairwise(ranks: Ranks, num_bytes: float) -> Iterator[Step]:
    for distance in range(1, ranks.size):
        yield ranks.ravel(), np.roll(ranks, -distance, axis=1).ravel(), num_bytes


def _at_once(steps: list[Step]) -> Iterator[Step]:
    if steps:
        sources, destinations, sizes = zip(*steps, strict=True)
        yield np.concatenate(sources), np.concatenate(destinations), sizes[0]
