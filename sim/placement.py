"""Where the instances of a deployment are: which GPUs of a node or cluster each has."""

from typing import NamedTuple

from hardware_models.schema import Cluster, Node
from sim.node_choice import node_of
from sim.scenario import Scenario


class Placement(NamedTuple):
    """Instances one after another: each on neighbouring GPUs of one node, nodes filled in order."""

    hardware: Node | Cluster
    ranks_each: int
    """GPUs of one instance."""

    def ranks(self, instance: int) -> range:
        """The GPUs of an instance by their rank in the hardware."""
        per_node = self._node.num_gpus // self.ranks_each
        node, place = divmod(instance, per_node)
        first = node * self._node.num_gpus + place * self.ranks_each
        return range(first, first + self.ranks_each)

    @property
    def room(self) -> int:
        """Instances that there are GPUs for."""
        nodes = self.hardware.num_nodes if isinstance(self.hardware, Cluster) else 1
        return nodes * (self._node.num_gpus // self.ranks_each)

    @property
    def _node(self) -> Node:
        return self.hardware.node if isinstance(self.hardware, Cluster) else self.hardware


def place(scenario: Scenario) -> Placement:
    """Where the instances of a scenario are that move KV to each other.

    Raises:
        ValueError: the machine has too few GPUs for them, or none at all.
    """
    ranks, count = scenario.tp_size * scenario.pp_size, scenario.num_replicas
    placement = Placement(scenario.cluster or node_of(scenario, count), ranks)
    if placement.room < count:
        raise ValueError(
            f"num_replicas={count} instances of {ranks} GPUs each do not fit on "
            f"{placement.hardware.name}, which has room for {placement.room}; KV moves between "
            "them over its links: take a larger node, or cluster=NAME"
        )
    return placement
