"""Nodes and clusters, composed of parts; every record of a part can be imported from here too."""

from dataclasses import dataclass
from enum import Enum

from hardware_models.board import Power, Price
from hardware_models.calibration import Calibration, FittedIteration
from hardware_models.carriers import Disk, HostMemory, Link, LinkKind, LinkMeasured, LinkPeak
from hardware_models.checks import require_not_negative, require_positive, require_text
from hardware_models.processors import (
    ComputeMeasured,
    ComputePeak,
    Cpu,
    Gpu,
    GpuMeasured,
    GpuPeak,
    Npu,
    peak_flops_per_s,
)

__all__ = [
    "Calibration",
    "Cluster",
    "ComputeMeasured",
    "ComputePeak",
    "Cpu",
    "Disk",
    "FittedIteration",
    "Gpu",
    "GpuMeasured",
    "GpuPeak",
    "GpuTopology",
    "HostMemory",
    "Link",
    "LinkKind",
    "LinkMeasured",
    "LinkPeak",
    "Node",
    "Npu",
    "Power",
    "Price",
    "peak_flops_per_s",
]


class GpuTopology(Enum):
    """How the GPUs of a node reach each other."""

    switch = "switch"
    """Every GPU has one gpu_link into a non-blocking switch."""
    pairs = "pairs"
    """GPU 2i and 2i + 1 share one gpu_link; others meet over PCIe."""
    pcie = "pcie"
    """No gpu_link: they meet over PCIe, on their host_link."""


@dataclass(kw_only=True)
class Node:
    """One machine. Its numbers live in its parts; the node only counts and connects them."""

    name: str
    """Name of the part: its file name."""
    gpu: Gpu | None = None
    """The GPU, all alike; None for a machine without."""
    num_gpus: int = 0
    """How many GPUs (no unit)."""
    gpu_topology: GpuTopology = GpuTopology.pcie
    """How GPUs reach each other."""
    gpu_link: Link | None = None
    """Direct link of one GPU, None when gpu_topology is pcie."""
    gpus_per_pcie_switch: int = 1
    """GPUs that share one PCIe uplink to the host (no unit)."""
    npu: Npu | None = None
    """The NPU of a device that has one."""
    cpu: Cpu | None = None
    """One CPU socket."""
    num_cpus: int = 1
    """How many sockets (no unit)."""
    host_memory: HostMemory | None = None
    """Main memory of all sockets together."""
    host_link: Link | None = None
    """From a GPU, a NIC or a PCIe switch to the host."""
    nic_link: Link | None = None
    """One network port."""
    num_nics: int = 0
    """How many network ports (no unit)."""
    disk: Disk | None = None
    """One drive."""
    calibration: Calibration | None = None
    """What was fitted on this very machine; None for one that nobody calibrated."""
    source: str
    """Where the composition comes from."""

    def __post_init__(self) -> None:
        require_text(self, "name", "source")
        require_positive(self, "gpus_per_pcie_switch", "num_cpus")
        require_not_negative(self, "num_gpus", "num_nics")
        self._require(self.num_gpus == 0 or self.gpu is not None, "num_gpus", "gpu")
        self._require(self.num_gpus == 0 or self.host_link is not None, "num_gpus", "host_link")
        self._require(self.num_nics == 0 or self.nic_link is not None, "num_nics", "nic_link")
        self._require(self.num_nics == 0 or self.host_link is not None, "num_nics", "host_link")
        if self.gpu is None and self.cpu is None:
            raise ValueError(f"Node {self.name}: gpu=None, cpu=None: nothing computes; give one")
        if self.npu is not None and self.host_memory is None:
            raise ValueError(
                f"Node {self.name}: npu={self.npu.name} with host_memory=None: an NPU is joined to "
                "the rest over main memory; name a part for host_memory or leave out the npu"
            )
        if (self.gpu_link is None) != (self.gpu_topology is GpuTopology.pcie):
            link = None if self.gpu_link is None else self.gpu_link.name
            raise ValueError(
                f"Node {self.name}: gpu_topology={self.gpu_topology.name} with gpu_link={link}: "
                "switch and pairs need a gpu_link, pcie has none; change one of the two"
            )

    @property
    def peer_link(self) -> Link | None:
        """What two neighbouring GPUs talk over: their direct link, else PCIe."""
        return self.gpu_link or self.host_link

    def _require(self, holds: bool, count: str, part: str) -> None:
        if not holds:
            raise ValueError(
                f"Node {self.name}: {count}={getattr(self, count)} needs {part}; "
                f"name a part for {part} or set {count}: 0"
            )


@dataclass(kw_only=True)
class Cluster:
    """Equal nodes around a leaf-spine network."""

    name: str
    """Name of the part: its file name."""
    node: Node
    """One node, all alike."""
    num_nodes: int
    """How many (no unit)."""
    fabric: Link | None = None
    """One network port as the fabric serves it; None: as fast as the node's nic_link."""
    nodes_per_pod: int | None = None
    """Nodes that share their leaf switches (no unit); None: all of them."""
    rail_optimized: bool = True
    """Port i of every node of a pod on leaf i of the pod; else a pod has one leaf for all ports."""
    oversubscription: float = 1.0
    """Bandwidth of a leaf to its nodes over that to the spine (no unit); 1: non-blocking."""
    spine_latency_s: float = 0.0
    """What the way up to the spine and down again adds, seconds; 0 where nobody measured it."""
    source: str
    """Where the composition comes from."""

    def __post_init__(self) -> None:
        require_text(self, "name", "source")
        require_positive(self, "num_nodes", "nodes_per_pod", "oversubscription")
        require_not_negative(self, "spine_latency_s")
        if self.num_nodes > 1 and self.node.num_nics == 0:
            raise ValueError(
                f"Cluster {self.name}: num_nodes={self.num_nodes} needs network ports, but "
                f"{self.node.name} has num_nics=0; give the node a nic_link and num_nics"
            )
        if self.nodes_per_pod is not None and self.nodes_per_pod > self.num_nodes:
            raise ValueError(
                f"Cluster {self.name}: nodes_per_pod={self.nodes_per_pod} must be at most "
                f"num_nodes={self.num_nodes}; leave it out for a single pod"
            )
        if self.oversubscription < 1:
            raise ValueError(
                f"Cluster {self.name}: oversubscription={self.oversubscription} must be 1 or more "
                "(bandwidth to the nodes over bandwidth to the spine); 1 is non-blocking"
            )

    @property
    def leaves_per_pod(self) -> int:
        """Leaf switches of a pod: one a rail, or one."""
        return self.node.num_nics if self.rail_optimized else 1

    @property
    def num_pods(self) -> int:
        """Pods, the last of which may be smaller."""
        return -(-self.num_nodes // (self.nodes_per_pod or self.num_nodes))

    @property
    def network_link(self) -> Link | None:
        """One port of the network: the fabric's where given, else the node's."""
        return self.fabric or self.node.nic_link
