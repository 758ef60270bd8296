"""The knowledge cache of a scenario: its tiers, and the search in front of it."""

from dataclasses import dataclass, field
from math import isfinite

from sim.units import GIB


@dataclass(kw_only=True)
class Knowledge:
    """How documents are searched and where their KV is kept. For workloads that retrieve some."""

    reuse: bool = True
    """Whether KV of documents is kept for later requests at all; false: as vLLM without it."""
    host_bytes: int = 192 * GIB
    """Host memory for KV that left the GPU (bytes); 0: the GPU alone keeps documents."""
    replicate_from: int | None = None
    """Uses after which a document right behind the system prompt has a copy in host memory ahead
    of need, so that losing the GPU does not lose what is cached behind it; null: never."""
    gpu_lost_s: list[float] = field(default_factory=list[float])
    """Instants at which all KV on the GPU is lost (seconds), in order: requests that ran are
    computed again, with what host memory still has."""
    gpu_restart_s: float = 0.0
    """How long nothing is computed after each of them (seconds)."""
    timeout_s: float | None = None
    """After so long a client without its full answer leaves (seconds); null: it waits."""
    search_cores: int = 4
    """Searches that run at once, each on a core of its own."""
    num_vectors: int | None = None
    """Vectors in the index; null: one a document. More where most documents are never asked for."""
    embedding_dimension: int = 1536
    """Numbers of a vector of the index: text-embedding-3-small's (fp32)."""
    searched_share: float = 0.125
    """Share of the vectors that a search compares: clusters probed over clusters (0 to 1)."""
    scan_bytes_per_s: float = 10e9
    """Rate at which one core compares vectors: an assumption, a core's memory bandwidth."""
    stage_overhead_s: float = 1e-3
    """What a stage of a search adds, such as a call of the vector database: an assumption."""

    def __post_init__(self) -> None:
        for name in ("search_cores", "embedding_dimension"):
            if getattr(self, name) < 1:
                raise ValueError(f"knowledge.{name}={getattr(self, name)} must be at least 1")
        if self.num_vectors is not None and self.num_vectors < 1:
            raise ValueError(
                f"knowledge.num_vectors={self.num_vectors} must be at least 1, or null for one a "
                "document"
            )
        if self.host_bytes < 0:
            raise ValueError(
                f"knowledge.host_bytes={self.host_bytes} must not be negative; 0 is no host tier"
            )
        if self.replicate_from is not None and self.replicate_from < 1:
            raise ValueError(
                f"knowledge.replicate_from={self.replicate_from} must be at least 1 use, or null"
            )
        self._check_mishaps()
        if not 0 < self.searched_share <= 1:
            raise ValueError(
                f"knowledge.searched_share={self.searched_share} must be in (0, 1]; try 0.125"
            )
        if not (isfinite(self.scan_bytes_per_s) and self.scan_bytes_per_s > 0):
            raise ValueError(
                f"knowledge.scan_bytes_per_s={self.scan_bytes_per_s} must be above 0; try 10e9"
            )
        if not (isfinite(self.stage_overhead_s) and self.stage_overhead_s >= 0):
            raise ValueError(
                f"knowledge.stage_overhead_s={self.stage_overhead_s} must not be negative; try 1e-3"
            )

    def _check_mishaps(self) -> None:
        lost_s = self.gpu_lost_s
        if sorted(lost_s) != lost_s or not all(isfinite(at) and at >= 0 for at in lost_s):
            raise ValueError(
                f"knowledge.gpu_lost_s={lost_s} must be instants from 0 on, in order; sort them"
            )
        if not (isfinite(self.gpu_restart_s) and self.gpu_restart_s >= 0):
            raise ValueError(
                f"knowledge.gpu_restart_s={self.gpu_restart_s} must not be negative; 0 is at once"
            )
        if self.timeout_s is not None and not (isfinite(self.timeout_s) and self.timeout_s > 0):
            raise ValueError(
                f"knowledge.timeout_s={self.timeout_s} must be above 0, or null for no limit"
            )

    def scan_s(self, num_documents: int) -> float:
        """Seconds in which one core compares the vectors of a search, of so many documents."""
        vectors = num_documents if self.num_vectors is None else self.num_vectors
        scanned_bytes = vectors * self.searched_share * self.embedding_dimension * 4
        return scanned_bytes / self.scan_bytes_per_s
