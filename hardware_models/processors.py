"""Chips that compute: GPU, NPU and CPU, with what is published and what was measured kept apart."""

from dataclasses import dataclass, field

from hardware_models.board import Power, Price
from hardware_models.checks import (
    require_not_negative,
    require_positive,
    require_rates,
    require_text,
)


@dataclass(kw_only=True)
class GpuPeak:
    """Datasheet figures of a GPU."""

    flops_per_s: dict[str, float]
    """Dense rate by dtype, without sparsity, accumulating in fp32 (int32 for int8), FLOP/s."""
    memory_bytes: int
    """Device memory, nominal, bytes."""
    memory_bandwidth_bytes_per_s: float
    """Device memory bandwidth, bytes/s."""
    l2_bytes: int | None = None
    """Last-level cache, bytes; None where not published."""
    sm_count: int | None = None
    """Streaming multiprocessors (no unit); None where not published."""
    boost_clock_hz: float | None = None
    """Their clock at the published rates, Hz; None where not published."""
    inline_ecc: bool = False
    """Error correction is kept in the memory itself, as GDDR6 cards of data centres do: one
    sixteenth less is left."""
    source: str
    """Datasheet or whitepaper, with its revision."""

    def __post_init__(self) -> None:
        require_rates(self, self.flops_per_s)
        require_positive(
            self, "memory_bytes", "memory_bandwidth_bytes_per_s", "l2_bytes", "sm_count",
            "boost_clock_hz",
        )  # fmt: skip
        require_text(self, "source")


@dataclass(kw_only=True)
class GpuMeasured:
    """What a GPU was seen to do; written by a measurement, never typed."""

    flops_per_s: dict[str, float] = field(default_factory=dict[str, float])
    """Achieved matrix-product rate by dtype, FLOP/s."""
    memory_bandwidth_bytes_per_s: float | None = None
    """Achieved device memory bandwidth, bytes/s."""
    usable_memory_bytes: int | None = None
    """Memory that a process can allocate, bytes."""
    launch_overhead_s: float | None = None
    """Host time to launch one kernel, seconds."""
    source: str
    """Machine, commit and date."""

    def __post_init__(self) -> None:
        require_rates(self, self.flops_per_s)
        require_positive(self, "memory_bandwidth_bytes_per_s", "usable_memory_bytes")
        require_not_negative(self, "launch_overhead_s")
        require_text(self, "source")


@dataclass(kw_only=True)
class Gpu:
    """One GPU."""

    name: str
    """Name of the part: its file name."""
    architecture: str
    """Chip generation, such as hopper."""
    peak: GpuPeak
    """Datasheet figures."""
    measured: GpuMeasured | None = None
    """Measured figures; None until someone measured."""
    power: Power | None = None
    """Power; None where not published."""
    price: Price | None = None
    """Price; None where not published."""
    proxy_of: str | None = None
    """GPU whose measured tables stand in for this one's; None when it has its own or needs none."""
    proxy_rule: str | None = None
    """How the proxy's seconds become this GPU's, in words."""

    @property
    def usable_memory_bytes(self) -> int:
        """Memory that a process can allocate, bytes: measured, else nominal less ECC."""
        if self.measured is not None and self.measured.usable_memory_bytes is not None:
            return self.measured.usable_memory_bytes
        nominal = self.peak.memory_bytes
        return nominal * 15 // 16 if self.peak.inline_ecc else nominal

    def __post_init__(self) -> None:
        require_text(self, "name", "architecture", "proxy_of", "proxy_rule")
        if (self.proxy_of is None) != (self.proxy_rule is None):
            raise ValueError(
                f"Gpu {self.name}: proxy_of={self.proxy_of!r} and proxy_rule={self.proxy_rule!r} "
                "must be given together; write both or neither"
            )


@dataclass(kw_only=True)
class ComputePeak:
    """Published rates of a CPU or NPU."""

    flops_per_s: dict[str, float]
    """Dense rate by dtype, FLOP/s (integer types: operations/s)."""
    source: str
    """Datasheet with its revision, or the derivation from published cores and clock."""

    def __post_init__(self) -> None:
        require_rates(self, self.flops_per_s)
        require_text(self, "source")


@dataclass(kw_only=True)
class ComputeMeasured:
    """Measured rates of a CPU or NPU."""

    flops_per_s: dict[str, float]
    """Achieved rate by dtype, FLOP/s (integer types: operations/s)."""
    launch_overhead_s: float | None = None
    """Time to start one graph or kernel, seconds."""
    source: str
    """Machine, commit and date, or the publication."""

    def __post_init__(self) -> None:
        require_rates(self, self.flops_per_s)
        require_not_negative(self, "launch_overhead_s")
        require_text(self, "source")


@dataclass(kw_only=True)
class Npu:
    """One neural processing unit of a phone or laptop; it shares the host's memory."""

    name: str
    """Name of the part: its file name."""
    architecture: str
    """Product line, such as hexagon."""
    peak: ComputePeak
    """Published rates."""
    measured: ComputeMeasured | None = None
    """Measured rates."""
    addressable_bytes: int | None = None
    """Most memory that it can map at once, bytes; None when it sees all."""
    power: Power | None = None
    """Power; None where not published."""
    source: str
    """Where addressable_bytes is stated, or that it sees all memory."""

    def __post_init__(self) -> None:
        require_text(self, "name", "architecture", "source")
        require_positive(self, "addressable_bytes")


@dataclass(kw_only=True)
class Cpu:
    """One CPU socket; a node says how many it has."""

    name: str
    """Name of the part: its file name."""
    architecture: str
    """Core generation, such as zen2."""
    num_cores: int
    """Physical cores of one socket (no unit)."""
    peak: ComputePeak | None = None
    """Rates of one socket; None where neither published nor derivable."""
    measured: ComputeMeasured | None = None
    """Measured rates of one socket."""
    power: Power | None = None
    """Power of one socket; None where not published."""
    source: str
    """Where num_cores is stated."""

    def __post_init__(self) -> None:
        require_text(self, "name", "architecture", "source")
        require_positive(self, "num_cores")


def peak_flops_per_s(part: Gpu | Npu | Cpu, dtype: str) -> float:
    """Published dense rate of a part for one dtype, FLOP/s.

    Raises:
        ValueError: the part has no published rate for the dtype.
    """
    rates = part.peak.flops_per_s if part.peak is not None else {}
    if dtype not in rates:
        known = ", ".join(rates) or "no rates at all"
        raise ValueError(
            f"dtype={dtype!r} has no peak rate on {part.name}, which has {known}; "
            "choose one of these or another part"
        )
    return rates[dtype]
