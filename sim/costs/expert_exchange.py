"""Tokens from attention nodes to expert nodes and back, in closed form: the fullest port decides.

M2N of MegaScale-Infer (arXiv 2504.02263), equation 6: every attention GPU sends its share of the
node's tokens, every expert GPU receives its share of the expert's, each over its own network port.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hardware_models.schema import Node
from sim.costs.alpha_beta import Hop


def node_port(node: Node, tp_size: int) -> Hop:
    """What the first `tp_size` GPUs of a node send over the network together, and as much back.

    Raises:
        ValueError: the node has no network ports, or fewer GPUs.
    """
    if node.nic_link is None or not node.num_nics or node.num_gpus < tp_size:
        raise ValueError(
            f"node {node.name} has {node.num_gpus} GPUs and {node.num_nics} network ports, and "
            f"{tp_size} GPUs are to reach other nodes; take a node with ports and as many GPUs"
        )
    each = node.num_nics * node.nic_link.bandwidth_bytes_per_s / node.num_gpus
    if node.host_link is not None:
        each = min(each, node.host_link.bandwidth_bytes_per_s)
    return Hop(node.nic_link.latency_s, tp_size * each)


def exchange_s(sent_bytes: ArrayLike, senders: Hop, receivers: Hop) -> float:
    """Seconds until the last byte is there, if all nodes begin to send at once.

    A lower bound where loads are uneven, as of `all_to_all_uneven_s`; exact where they are not.

    Args:
        sent_bytes: from sender (row) to receiver (column). Shape: senders, receivers.
        senders: the ports of each sender.
        receivers: the ports of each receiver.
    """
    sent = np.asarray(sent_bytes, np.float64)
    if not sent.any():
        return 0.0
    fullest = (sent.sum(axis=1).max(), sent.sum(axis=0).max())
    return float(fullest_ports_s(*fullest, senders, receivers))


def fullest_ports_s(
    sent_bytes: ArrayLike, received_bytes: ArrayLike, senders: Hop, receivers: Hop
) -> NDArray[np.float64]:
    """Seconds of exchanges whose fullest sender and receiver have so many bytes, one each.

    Args:
        sent_bytes: by the sender that has most.
        received_bytes: by the receiver that gets most.
        senders: the ports of a sender.
        receivers: the ports of a receiver.
    """
    latency_s = (senders.latency_s + receivers.latency_s) / 2
    busy_s = np.maximum(
        np.asarray(sent_bytes, np.float64) / senders.bytes_per_s,
        np.asarray(received_bytes, np.float64) / receivers.bytes_per_s,
    )
    return latency_s + busy_s
