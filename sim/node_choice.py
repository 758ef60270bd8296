"""The node that a replica runs on, also where a scenario names only a GPU."""

from hardware_models.parts import load_node, names
from hardware_models.schema import Node
from sim.scenario import Scenario


def node_of(scenario: Scenario) -> Node:
    """The scenario's node, or the smallest shipped one with enough GPUs of its kind.

    Raises:
        ValueError: the node has fewer GPUs than a replica has ranks, or no such node is shipped.
    """
    ranks = scenario.tp_size * scenario.pp_size
    if scenario.node is not None:
        if scenario.node.num_gpus < ranks:
            raise ValueError(
                f"tp_size={scenario.tp_size} times pp_size={scenario.pp_size} takes {ranks} GPUs, "
                f"and node {scenario.node.name} has {scenario.node.num_gpus}; take a larger node"
            )
        return scenario.node
    gpu = scenario.gpu.name if scenario.gpu is not None else ""
    sizes = sorted(
        (int(tail), name)
        for name in names("node")
        for head, _, tail in [name.rpartition("_x")]
        if head == gpu and tail.isdigit()
    )
    fitting = [name for size, name in sizes if size >= ranks]
    if not fitting:
        most = sizes[-1][0] if sizes else 0
        raise ValueError(
            f"tp_size={scenario.tp_size} times pp_size={scenario.pp_size} takes {ranks} GPUs, and "
            f"the largest node of {gpu} that is known has {most}; give node=NAME instead of gpu"
        )
    return load_node(fitting[0])
