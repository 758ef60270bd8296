"""The two executors of `collectives`: over the same links they take the same time.

The real ones over an emulated link are held back by its closed form; the simulated ones send every
message over a star of such links.
"""

from dataclasses import replace

import pytest

from backends.emulated_link import EmulatedLink
from hardware_models.parts import load_node
from hardware_models.schema import GpuTopology
from sim.processes.collectives import Collectives
from sim.processes.exact_time import ExactEnvironment
from sim.processes.network import Network
from sim.state.links import Routes

BYTES_PER_S = 1e6
ALGORITHMS = {
    "all_reduce": "ring", "reduce_scatter": "ring", "all_gather": "ring", "all_to_all": "pairwise",
    "broadcast": "tree",
}  # fmt: skip
"""What an emulated link stands for."""


def star(ranks):
    """A node whose GPUs reach each other over a switch: half of the latency up, half down."""
    node = load_node("h100_sxm_x8")
    assert node.gpu_topology is GpuTopology.switch
    assert node.gpu_link is not None
    link = replace(
        node.gpu_link, peak=replace(node.gpu_link.peak, bandwidth_bytes_per_s=BYTES_PER_S),
        measured=None,
    )  # fmt: skip
    return replace(node, num_gpus=ranks, gpu_link=link)


def simulated_s(operation, size_bytes, ranks):
    environment = ExactEnvironment()
    network = Network(environment, Routes(star(ranks)))
    group = Collectives(network, range(ranks), ranks)
    # What nccl-tests calls the size of an all-gather is the gathered vector.
    payload = size_bytes * ranks if operation == "all_gather" else size_bytes
    environment.run(environment.process(group.run(operation, payload, ALGORITHMS[operation])))
    return environment.now, float(network.latency_s(network.wiring.gpu_paths([0], [1]))[0])


@pytest.mark.parametrize("operation", ALGORITHMS)
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("size_bytes", [24, 240_000])
def test_an_emulated_link_and_a_star_of_links_agree(operation, ranks, size_bytes):
    took_s, latency_s = simulated_s(operation, size_bytes, ranks)
    link = EmulatedLink(latency_s=latency_s, bandwidth_bytes_per_s=BYTES_PER_S)
    assert link.seconds(operation, size_bytes, ranks) == pytest.approx(took_s, rel=1e-9)
