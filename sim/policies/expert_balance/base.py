"""Expert balance: which experts have replicas, and on which node each one lies."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.policies.base import Policy
from sim.state.expert_dispatch import replicas_of


class BalanceView(NamedTuple):
    """What a rule knows of the experts and of the nodes that hold them. Read only."""

    loads: NDArray[np.float64]
    """Tokens that recently went to each expert [layers, experts]."""
    num_nodes: int
    """Expert nodes."""
    slots_per_node: int
    """Physical experts that a node holds of each layer."""
    num_groups: int = 1
    """Groups of experts (group-limited routing); 1: none."""
    num_hosts: int = 1
    """Machines that the nodes are spread over evenly, in order. EPLB calls them nodes, and our
    nodes GPUs."""


class Placement(NamedTuple):
    """Which logical expert every physical one is."""

    physical_to_logical: NDArray[np.int64]
    """Logical expert of each slot [layers, slots]; slots are numbered node by node."""
    slots_per_node: int
    """Slot s lies on node s // slots_per_node."""

    @property
    def num_experts(self) -> int:
        """Logical experts: every one has a slot."""
        return int(self.physical_to_logical.max()) + 1

    def node_of(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """The nodes that slots lie on, in the same shape."""
        return slots // self.slots_per_node

    def replicas(self, layer: int) -> list[NDArray[np.int64]]:
        """The slots of every logical expert of a layer, each in order."""
        found = replicas_of(self.physical_to_logical[layer], self.num_experts)
        return np.split(found.slots, found.first[1:])

    def node_loads(self, loads: NDArray[np.float64]) -> NDArray[np.float64]:
        """What each node carries where an expert's replicas share its load evenly.

        Args:
            loads: of each logical expert [layers, experts].

        Returns:
            float64 [layers, nodes].
        """
        held = self.physical_to_logical
        counts = np.stack([np.bincount(row, minlength=loads.shape[1]) for row in held])
        shares = np.take_along_axis(loads / counts, held, axis=1)
        return shares.reshape(len(held), -1, self.slots_per_node).sum(axis=2)


@dataclass(kw_only=True)
class ExpertBalance(Policy):
    """Places the physical experts of every layer, from the loads of the time before."""

    @abstractmethod
    def place(self, view: BalanceView) -> Placement:
        """A placement in which every expert has a slot.

        Args:
            view: loads and nodes. Not changed.

        Raises:
            ValueError: the rule cannot fill so many slots.
        """


def checked_placement(rule: ExpertBalance, view: BalanceView) -> Placement:
    """What a rule places, for both panels.

    Raises:
        ValueError: the experts do not fit, the view is at odds with itself, or the rule breaks the
            contract.
    """
    _require_placeable(view)
    placement = rule.place(view)
    _require_whole(rule, placement, view)
    return placement


def _require_placeable(view: BalanceView) -> None:
    """Refuse loads and nodes for which there is no placement."""
    num_experts = view.loads.shape[1]
    for name in ("num_nodes", "slots_per_node", "num_groups", "num_hosts"):
        if getattr(view, name) < 1:
            raise ValueError(f"{name}={getattr(view, name)} must be at least 1; try {name}=1")
    num_slots = view.num_nodes * view.slots_per_node
    if num_slots < num_experts:
        raise ValueError(
            f"num_nodes={view.num_nodes} with slots_per_node={view.slots_per_node} hold "
            f"{num_slots} physical experts and must hold all of num_experts={num_experts}; try "
            f"slots_per_node={-(-num_experts // view.num_nodes)}"
        )
    _require_divisor("num_hosts", view.num_hosts, "num_nodes", view.num_nodes)
    _require_divisor("num_groups", view.num_groups, "num_experts", num_experts)
    wrong = ~(np.isfinite(view.loads) & (view.loads >= 0))
    if wrong.any():
        layer, expert = np.argwhere(wrong)[0].tolist()
        raise ValueError(
            f"loads[{layer}, {expert}]={view.loads[layer, expert]} must be finite and not "
            "negative; count tokens"
        )


def _require_divisor(name: str, part: int, of: str, whole: int) -> None:
    if whole % part:
        fitting = [size for size in range(1, whole + 1) if whole % size == 0]
        near = min(fitting, key=lambda size: abs(size - part))
        raise ValueError(f"{name}={part} must divide {of}={whole}; try {name}={near}")


def _require_whole(rule: ExpertBalance, placement: Placement, view: BalanceView) -> None:
    name = f"policy {type(rule).__name__}"
    held, num_experts = placement.physical_to_logical, view.loads.shape[1]
    shape = (len(view.loads), view.num_nodes * view.slots_per_node)
    if held.shape != shape or placement.slots_per_node != view.slots_per_node:
        raise ValueError(
            f"{name} places experts of shape {held.shape} with slots_per_node="
            f"{placement.slots_per_node}; they must be [layers, slots] = {shape} with "
            f"slots_per_node={view.slots_per_node}; mend the policy"
        )
    if held.dtype.kind != "i":
        raise ValueError(f"{name} places {held.dtype} and must place int64; mend the policy")
    wrong = (held < 0) | (held >= num_experts)
    if wrong.any():
        layer, slot = np.argwhere(wrong)[0].tolist()
        raise ValueError(
            f"{name}: slot {slot} of layer {layer} holds expert {held[layer, slot]} and there are "
            f"experts 0 to {num_experts - 1}; mend the policy"
        )
    for layer, row in enumerate(held):
        counts = np.bincount(row, minlength=num_experts)
        if not counts.all():
            raise ValueError(
                f"{name}: expert {int(counts.argmin())} of layer {layer} has 0 slots and every "
                "expert must have one; mend the policy"
            )
