"""Seconds that the ranks of one replica spend on each other, iteration by iteration."""

from collections.abc import Callable

from hardware_models.schema import Gpu, Node
from sim.costs.collective_costs import Fallback, measured_collectives
from sim.costs.collective_tables import CollectiveCost, Estimate
from sim.costs.kernel_cost import Communication
from sim.costs.link_collectives import LinkCollectives
from sim.costs.seconds import NOTHING, Seconds
from sim.models.architecture import Architecture
from sim.models.communication import Collective, iteration_collectives
from sim.models.work import IterationShape

TABLE_NAMES = {"send_receive": "send_recv"}
"""The operations of `iteration_collectives` that costs know by another name."""


def link_costs(node: Node) -> CollectiveCost:
    """Collectives by the datasheet of the links."""
    return LinkCollectives(node)


def measured_costs(gpu: Gpu, node: Node, dtype: str, engine: str) -> CollectiveCost:
    """Collectives as measured, with the engine's own all-reduce; links for what was not.

    Raises:
        ValueError: nothing was measured on this GPU or its stand-in, or not in this type.
    """
    measured = measured_collectives(gpu, node, dtype=dtype, all_reduce=engine)
    return Fallback(measured, LinkCollectives(node))


def replica_communication(
    architecture: Architecture, sizes: tuple[int, int], dtype_bytes: int, cost: CollectiveCost
) -> Communication:
    """What an iteration of a replica on several ranks spends on communication.

    Nothing of it overlaps with computing, as in vLLM's default. A batch goes through the stages
    of a pipeline one after another, so the handing over adds up as well.

    Args:
        architecture: the whole model.
        sizes: `tp_size` and `pp_size`.
        dtype_bytes: bytes of an element of activations.
        cost: of each collective inside the node.
    """

    def seconds(tokens: int, sampled: int) -> Seconds:
        shape = IterationShape(tokens, 0, 0, 1, 0, 0, sampled)
        total = NOTHING
        for one in iteration_collectives(architecture, shape, *sizes, dtype_bytes):
            # Handing over happens on the ranks of a stage at once; its count is of all of them.
            times = one.count
            if one.name == "hidden_states":
                times //= sizes[0]
            total = total.plus(_seconds(one, cost.seconds).times(times))
        return total

    return seconds


def _seconds(one: Collective, cost: Callable[[str, int, float], Estimate]) -> Seconds:
    # Costs count the vector that an all-gather leaves on every rank.
    payload = one.payload_bytes * (one.ranks if one.operation == "all_gather" else 1)
    estimate = cost(TABLE_NAMES.get(one.operation, one.operation), one.ranks, payload)
    return Seconds()._replace(**{estimate.source.value: estimate.seconds})
