"""Parts that hold or move bytes: host memory, disks and links."""

from dataclasses import dataclass
from enum import Enum

from hardware_models.checks import require_not_negative, require_positive, require_text


@dataclass(kw_only=True)
class HostMemory:
    """Main memory of a node, all sockets together."""

    name: str
    """Name of the part: its file name."""
    memory_bytes: int
    """Capacity, bytes."""
    bandwidth_bytes_per_s: float
    """Peak bandwidth of all channels, bytes/s."""
    latency_s: float | None = None
    """Load-to-use latency, seconds; None where not published."""
    source: str
    """Document, or the derivation from transfer rate and channels."""

    def __post_init__(self) -> None:
        require_text(self, "name", "source")
        require_positive(self, "memory_bytes", "bandwidth_bytes_per_s")
        require_not_negative(self, "latency_s")


@dataclass(kw_only=True)
class Disk:
    """One drive."""

    name: str
    """Name of the part: its file name."""
    capacity_bytes: int | None = None
    """Capacity, bytes; None when it does not matter."""
    read_bandwidth_bytes_per_s: float
    """Sequential read, bytes/s."""
    write_bandwidth_bytes_per_s: float
    """Sequential write, bytes/s."""
    latency_s: float
    """Time to the first byte of a read, seconds."""
    source: str
    """Document for the bandwidths."""
    latency_source: str
    """Document or assumption for the latency."""

    def __post_init__(self) -> None:
        require_text(self, "name", "source", "latency_source")
        require_positive(
            self, "capacity_bytes", "read_bandwidth_bytes_per_s", "write_bandwidth_bytes_per_s"
        )
        require_not_negative(self, "latency_s")


class LinkKind(Enum):
    """What a link is made of."""

    nvlink = "nvlink"
    pcie = "pcie"
    infiniband = "infiniband"
    ethernet = "ethernet"


@dataclass(kw_only=True)
class LinkPeak:
    """Published figures of a link, per direction."""

    bandwidth_bytes_per_s: float
    """Bandwidth in one direction, bytes/s; marketing totals of both directions are halved."""
    latency_s: float
    """Time of an empty transfer from device to device, switches included, seconds."""
    source: str
    """Document for the bandwidth."""
    latency_source: str
    """Document or assumption for the latency."""

    def __post_init__(self) -> None:
        require_positive(self, "bandwidth_bytes_per_s")
        require_not_negative(self, "latency_s")
        require_text(self, "source", "latency_source")


@dataclass(kw_only=True)
class LinkMeasured:
    """What a link was seen to do, per direction."""

    bandwidth_bytes_per_s: float
    """Achieved bandwidth of large transfers, bytes/s."""
    latency_s: float | None = None
    """Time of an empty transfer from device to device, seconds."""
    source: str
    """Machine, commit and date."""

    def __post_init__(self) -> None:
        require_positive(self, "bandwidth_bytes_per_s")
        require_not_negative(self, "latency_s")
        require_text(self, "source")


@dataclass(kw_only=True)
class Link:
    """One link of one device, the same in both directions."""

    name: str
    """Name of the part: its file name."""
    kind: LinkKind
    """What it is made of."""
    peak: LinkPeak
    """Published figures."""
    measured: LinkMeasured | None = None
    """Measured figures; they win over the published ones."""

    def __post_init__(self) -> None:
        require_text(self, "name")

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """Bandwidth in one direction, bytes/s: measured where someone measured, else published."""
        return (self.measured or self.peak).bandwidth_bytes_per_s

    @property
    def latency_s(self) -> float:
        """Latency, seconds: measured where someone measured, else published or assumed."""
        if self.measured is not None and self.measured.latency_s is not None:
            return self.measured.latency_s
        return self.peak.latency_s
