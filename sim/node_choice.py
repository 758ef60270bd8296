"""The node that a replica runs on, also where a scenario names only a GPU."""

from hardware_models.parts import load_node, names
from hardware_models.schema import Node
from sim.scenario import Scenario


def node_of(scenario: Scenario, instances: int = 1) -> Node:
    """The scenario's node, or the smallest shipped one with enough GPUs of its kind.

    Args:
        scenario: names a node, a cluster of them or a GPU.
        instances: that share it, where the node is to be found.

    Raises:
        ValueError: the node has fewer GPUs than a replica has ranks, or no such node is shipped.
    """
    ranks = scenario.tp_size * scenario.pp_size
    if (node := scenario.machine) is not None:
        if node.num_gpus < ranks:
            raise ValueError(
                f"tp_size={scenario.tp_size} times pp_size={scenario.pp_size} takes {ranks} GPUs, "
                f"and node {node.name} has {node.num_gpus}; take a larger node"
            )
        return node
    wanted = ranks * instances
    gpu = scenario.gpu.name if scenario.gpu is not None else ""
    sizes = sorted(
        (int(tail), name)
        for name in names("node")
        for head, _, tail in [name.rpartition("_x")]
        if head == gpu and tail.isdigit()
    )
    fitting = [name for size, name in sizes if size >= wanted]
    if not fitting:
        most = sizes[-1][0] if sizes else 0
        raise ValueError(
            f"tp_size={scenario.tp_size} times pp_size={scenario.pp_size}"
            + (f" times num_replicas={instances}" if instances > 1 else "")
            + f" takes {wanted} GPUs, and the largest node of {gpu} that is known has {most}; "
            "give node=NAME or cluster=NAME instead of gpu"
        )
    return load_node(fitting[0])
