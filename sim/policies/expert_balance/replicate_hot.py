"""Replicas for the hottest experts, packed so that nodes carry about the same: EPLB (DeepSeek-V3).

Both of its published policies, hierarchical and global. MegaScale-Infer balances to the same end,
replicas by recent popularity and greedily the least maximum over the nodes, but may split an
expert's load unevenly.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sim.policies.expert_balance.base import BalanceView, ExpertBalance, Placement

Whole = NDArray[np.int64]
Loads = NDArray[np.float64]


@dataclass(kw_only=True)
class ReplicateHot(ExpertBalance):
    """Groups of experts to hosts, replicas within a host, then physical experts to its nodes.

    That hierarchy holds where the hosts share the groups out evenly; where they cannot, one host
    with one group is assumed (EPLB's global policy).
    """

    def place(self, view: BalanceView) -> Placement:
        """Greedy in every step, layer by layer."""
        even = view.num_groups % view.num_hosts == 0
        num_groups, num_hosts = (view.num_groups, view.num_hosts) if even else (1, 1)
        held = _experts_of_hosts(view.loads, num_groups, num_hosts)
        loads = np.take_along_axis(view.loads, held.reshape(len(held), -1), axis=1)
        # From here on every host of every layer is a problem of its own.
        held = held.reshape(len(held) * num_hosts, -1)
        nodes = view.num_nodes // num_hosts
        copies, shares = replicate(loads.reshape(held.shape), nodes * view.slots_per_node)
        slots = pack(shares, nodes).reshape(copies.shape)
        experts = np.take_along_axis(held, np.take_along_axis(copies, slots, axis=1), axis=1)
        return Placement(experts.reshape(len(view.loads), -1), view.slots_per_node)


def _experts_of_hosts(loads: Loads, num_groups: int, num_hosts: int) -> Whole:
    """Whole groups packed by load [layers, hosts, experts of a host]."""
    num_layers, num_experts = loads.shape
    size = num_experts // num_groups
    groups = pack(loads.reshape(num_layers, num_groups, size).sum(axis=2), num_hosts)
    experts = groups[..., None] * size + np.arange(size, dtype=np.int64)
    return experts.reshape(num_layers, num_hosts, -1)


def replicate(loads: Loads, num_slots: int) -> tuple[Whole, Loads]:
    """Fill slots with copies: each further one goes to the largest load over replicas.

    No other choice of so many copies has a smaller largest share.

    Args:
        loads: of each expert [rows, experts]; of equal ones the first gets the copy.
        num_slots: at least as many as experts.

    Returns:
        The expert of each slot [rows, slots], each expert's first copy in its own slot and the
        others behind in the order in which they were made, and what each slot carries.
    """
    num_rows, num_experts = loads.shape
    copies = np.tile(np.arange(num_slots, dtype=np.int64), (num_rows, 1))
    counts = np.ones(loads.shape, dtype=np.int64)
    rows = np.arange(num_rows, dtype=np.int64)
    for slot in range(num_experts, num_slots):
        hottest = (loads / counts).argmax(axis=1)
        copies[:, slot] = hottest
        counts[rows, hottest] += 1
    return copies, np.take_along_axis(loads / counts, copies, axis=1)


def pack(loads: Loads, num_packs: int) -> Whole:
    """Equally many items into each pack: the heaviest first, into the lightest pack with room.

    The heaviest pack exceeds the lightest by the heaviest item at most.

    Args:
        loads: of each item [rows, items]; of equal ones the first is packed first.
        num_packs: it divides the items. Of equally light packs the first is taken.

    Returns:
        The items of each pack in the order in which they came [rows, packs, items of a pack].
    """
    num_rows, num_items = loads.shape
    room = num_items // num_packs
    if room == 1:  # as published: nothing to balance, so nothing moves
        return np.tile(np.arange(num_items, dtype=np.int64)[:, None], (num_rows, 1, 1))
    packed = np.empty((num_rows, num_packs, room), dtype=np.int64)
    weights = np.zeros((num_rows, num_packs))
    counts = np.zeros((num_rows, num_packs), dtype=np.int64)
    rows = np.arange(num_rows, dtype=np.int64)
    for items in np.argsort(-loads, axis=1, kind="stable").T:
        lightest = np.where(counts < room, weights, np.inf).argmin(axis=1)
        packed[rows, lightest, counts[rows, lightest]] = items
        weights[rows, lightest] += loads[rows, items]
        counts[rows, lightest] += 1
    return packed
