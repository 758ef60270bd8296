"""Seconds of a collective in closed form: so many steps, so many bytes over the slowest link.

Hockney's model, a step of b bytes takes latency + b / bandwidth, with the algorithms of Thakur,
Rabenseifner, Gropp, "Optimization of Collective Communication Operations in MPICH" (IJHPCA 2005).

`payload_bytes` is what nccl-tests prints as size: the larger of one rank's input and output.

    all_reduce      the vector of each rank
    reduce_scatter  the vector of each rank, before it is scattered
    all_gather      the gathered vector: num_ranks times what each rank gives
    all_to_all      all that one rank sends, its own share included
    broadcast       the vector
    send_recv       the message
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from hardware_models.routing import Router
from hardware_models.schema import Cluster, Node
from hardware_models.topology import Edge, cluster_edges, node_edges


@dataclass(frozen=True, slots=True)
class Hop:
    """From one rank to its neighbour, or the ports of a rank into a switch."""

    latency_s: float
    """Time of an empty message."""
    bytes_per_s: float
    """What one rank sends, while receiving as much."""

    def step_s(self, num_bytes: float) -> float:
        """Seconds of one message."""
        return self.latency_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class Group:
    """The ranks of a collective: as many on every node, each with a port of its own."""

    ranks_per_node: int
    num_nodes: int
    inside: Hop
    """Between ranks of one node."""
    between: Hop
    """Between ranks of different nodes; not used when num_nodes is 1."""
    launch_s: float = 0.0
    """Seconds before the first message, once a collective."""

    def __post_init__(self) -> None:
        if self.ranks_per_node < 1 or self.num_nodes < 1:
            raise ValueError(
                f"ranks_per_node={self.ranks_per_node}, num_nodes={self.num_nodes}: both must be 1 "
                "or more"
            )

    @property
    def num_ranks(self) -> int:
        """All ranks."""
        return self.ranks_per_node * self.num_nodes


ALGORITHMS: dict[str, tuple[str, ...]] = {
    "all_reduce": ("ring", "tree"),
    "reduce_scatter": ("ring",),
    "all_gather": ("ring",),
    "all_to_all": ("direct", "pairwise"),
    "broadcast": ("chain", "tree"),
    "send_recv": ("direct",),
}
"""For every operation the algorithms that are known; the first is the default."""


def collective_s(
    operation: str, payload_bytes: float, group: Group, algorithm: str | None = None
) -> float:
    """Seconds of a collective on an idle network.

    Over several nodes rings and trees are hierarchical: inside every node and between the nodes,
    where each rank deals with its share over its own port.

    Args:
        operation: a key of `ALGORITHMS`.
        payload_bytes: as the module says.
        group: the ranks and their links.
        algorithm: one of `ALGORITHMS[operation]`.

    Raises:
        ValueError: the operation or the algorithm is not known, or the payload is negative.
    """
    chosen = known_algorithm(operation, algorithm)
    if not payload_bytes >= 0:
        raise ValueError(f"payload_bytes={payload_bytes} must be zero or more; give bytes")
    if group.num_ranks == 1:
        return 0.0
    return group.launch_s + _FORMS[operation, chosen](float(payload_bytes), group)


def known_algorithm(operation: str, algorithm: str | None = None) -> str:
    """The algorithm itself, or the operation's default.

    Raises:
        ValueError: the operation or the algorithm is not known.
    """
    if operation not in ALGORITHMS:
        raise ValueError(
            f"operation={operation!r} is not known; there are: {', '.join(ALGORITHMS)}"
        )
    known = ALGORITHMS[operation]
    if algorithm is not None and algorithm not in known:
        raise ValueError(
            f"algorithm={algorithm!r} is not known for {operation}; there are: {', '.join(known)}"
        )
    return algorithm or known[0]


def all_to_all_uneven_s(sent_bytes: ArrayLike, group: Group) -> float:
    """Seconds of an uneven all-to-all, all messages at once: those of the fullest port.

    A lower bound: fair sharing keeps a port that several senders fill from being full throughout.
    Exact when all messages are equal.

    Args:
        sent_bytes: from rank (row) to rank (column); the diagonal stays where it is.
            Shape: ranks, ranks.
        group: the ranks and their links.

    Raises:
        ValueError: the shape is not ranks by ranks.
    """
    sent = np.array(sent_bytes, np.float64)
    count = group.num_ranks
    if sent.shape != (count, count):
        raise ValueError(f"sent_bytes has shape {sent.shape}; it must be {(count, count)}")
    np.fill_diagonal(sent, 0.0)
    node = np.arange(count) // group.ranks_per_node
    near = node[:, None] == node[None, :]

    def fullest_s(part: np.ndarray, hop: Hop) -> float:
        if not part.any():
            return 0.0
        return hop.step_s(max(part.sum(axis=0).max(), part.sum(axis=1).max()))

    inside, between = np.where(near, sent, 0.0), np.where(near, 0.0, sent)
    slowest_s = max(fullest_s(inside, group.inside), fullest_s(between, group.between))
    return group.launch_s + slowest_s if count > 1 else 0.0


def group_of(
    hardware: Node | Cluster, num_ranks: int, num_nodes: int | None = None, *, share: float = 1.0
) -> Group:
    """The first GPUs of the first nodes as a group, from the links of their parts alone.

    Args:
        hardware: a node, or a cluster.
        num_ranks: GPUs that take part, as many on every node.
        num_nodes: nodes that take part; None: as few as hold the ranks.
        share: of the bandwidth of every link that messages reach.

    Raises:
        ValueError: there are not so many GPUs, or they do not spread evenly.
    """
    node = hardware.node if isinstance(hardware, Cluster) else hardware
    there = hardware.num_nodes if isinstance(hardware, Cluster) else 1
    if num_nodes is None:
        num_nodes = max(1, -(-num_ranks // max(1, node.num_gpus)))
    per_node, rest = divmod(num_ranks, max(1, num_nodes))
    if rest or not 1 <= per_node <= node.num_gpus or not 1 <= num_nodes <= there:
        raise ValueError(
            f"num_ranks={num_ranks} on num_nodes={num_nodes} must be as many on every node, "
            f"at most {node.num_gpus} on each of the {there} of {hardware.name}; change one"
        )
    router = Router(hardware)
    edges = cluster_edges(hardware) if isinstance(hardware, Cluster) else node_edges(hardware)
    by_ends = {pair: edge for edge in edges for pair in (edge.ends, edge.ends[::-1])}
    prefix = "node0/" if isinstance(hardware, Cluster) else ""
    nothing = Hop(0.0, np.inf)
    ring = [(f"{prefix}gpu{i}", f"{prefix}gpu{(i + 1) % per_node}") for i in range(per_node)]
    inside = nothing if per_node == 1 else _slowest([router.path(*p) for p in ring], by_ends, share)
    away = [(f"node0/gpu{i}", f"node1/gpu{i}") for i in range(per_node)]
    between = nothing
    if num_nodes > 1:
        between = _slowest([router.path(*pair) for pair in away], by_ends, share)
    return Group(per_node, num_nodes, inside, between)


def _slowest(
    paths: list[tuple[str, ...]], by_ends: dict[tuple[str, ...], Edge], share: float
) -> Hop:
    """The slowest of paths that are all in use at once."""
    hops = [list(pairwise(path)) for path in paths]
    users = Counter(pair for hop in hops for pair in hop)
    latency_s = max(sum(by_ends[pair].latency_s for pair in hop) for hop in hops)
    slowest = min(by_ends[pair].bandwidth_bytes_per_s / count for pair, count in users.items())
    return Hop(latency_s, share * slowest)


def _doublings(ranks: int) -> int:
    return (ranks - 1).bit_length()


def _scatter(payload: float, group: Group) -> float:
    """A ring inside every node; then a ring between nodes for what each rank holds of the sum."""
    inside, between = group.ranks_per_node, group.num_nodes
    seconds = (inside - 1) * group.inside.step_s(payload / inside)
    return seconds + (between - 1) * group.between.step_s(payload / inside / between)


def _tree(payload: float, group: Group) -> float:
    seconds = _doublings(group.ranks_per_node) * group.inside.step_s(payload)
    return seconds + _doublings(group.num_nodes) * group.between.step_s(payload)


def _chain(payload: float, group: Group) -> float:
    """The vector in pieces so small that all ranks but the last send at once."""
    steps_s = (group.ranks_per_node - 1) * group.inside.latency_s
    steps_s += (group.num_nodes - 1) * group.between.latency_s
    used = [hop for hop, n in _hops(group) if n > 1]
    return steps_s + payload / min(hop.bytes_per_s for hop in used)


def _direct_all_to_all(payload: float, group: Group) -> float:
    """All messages at once; those inside a node do not meet those between nodes."""
    near, ranks = group.ranks_per_node, group.num_ranks
    inside_s = group.inside.step_s(payload * (near - 1) / ranks) if near > 1 else 0.0
    away = payload * (ranks - near) / ranks
    return max(inside_s, group.between.step_s(away) if group.num_nodes > 1 else 0.0)


def _pairwise_all_to_all(payload: float, group: Group) -> float:
    """In step k, rank i sends to rank i + k: always over nodes for some, inside them for few k."""
    message, near = payload / group.num_ranks, group.ranks_per_node
    inside_s, between_s = group.inside.step_s(message), group.between.step_s(message)
    if group.num_nodes == 1:
        return (near - 1) * inside_s
    mixed = 2 * (near - 1)
    return mixed * max(inside_s, between_s) + (group.num_ranks - 1 - mixed) * between_s


def _send(payload: float, group: Group) -> float:
    return (group.between if group.num_nodes > 1 else group.inside).step_s(payload)


def _hops(group: Group) -> tuple[tuple[Hop, int], tuple[Hop, int]]:
    return (group.inside, group.ranks_per_node), (group.between, group.num_nodes)


_FORMS: dict[tuple[str, str], Callable[[float, Group], float]] = {
    ("all_reduce", "ring"): lambda payload, group: 2 * _scatter(payload, group),
    ("all_reduce", "tree"): lambda payload, group: 2 * _tree(payload, group),
    ("reduce_scatter", "ring"): _scatter,
    ("all_gather", "ring"): _scatter,
    ("all_to_all", "direct"): _direct_all_to_all,
    ("all_to_all", "pairwise"): _pairwise_all_to_all,
    ("broadcast", "chain"): _chain,
    ("broadcast", "tree"): _tree,
    ("send_recv", "direct"): _send,
}
