"""Every expert in the slot of its number: what a model that is just loaded has."""

from dataclasses import dataclass

import numpy as np

from sim.policies.expert_balance.base import BalanceView, ExpertBalance, Placement


@dataclass(kw_only=True)
class Static(ExpertBalance):
    """Expert e in slot e; further slots repeat all experts in order, whatever the loads."""

    def place(self, view: BalanceView) -> Placement:
        """The same in every layer.

        Raises:
            ValueError: the slots are no whole number of times the experts.
        """
        num_layers, num_experts = view.loads.shape
        num_slots = view.num_nodes * view.slots_per_node
        if num_slots % num_experts:
            raise ValueError(
                f"policy Static: num_nodes={view.num_nodes} with slots_per_node="
                f"{view.slots_per_node} hold {num_slots} physical experts and must hold each of "
                f"num_experts={num_experts} equally often; choose a multiple of {num_experts}, or "
                "policy/expert_balance=replicate_hot, which fills any number of slots"
            )
        row = np.arange(num_slots, dtype=np.int64) % num_experts
        return Placement(np.tile(row, (num_layers, 1)), view.slots_per_node)
