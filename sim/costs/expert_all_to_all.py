# pyright: basic
"""Dispatch and combine of experts' tokens with DeepEP's low-latency kernels, from measurements.

Every token goes to `top_k` ranks, spread evenly. Messages inside a node go over NVLink and those
between nodes over RDMA, at once: the direct all-to-all of `sim/costs/alpha_beta.py`, whose two
hops are fitted, a pair for dispatch (fp8 with a scale for every 128 values), a pair for combine
(bf16).
scipy comes without complete types.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from sim.costs.alpha_beta import Group, Hop, collective_s
from sim.costs.collective_silicon import comm_files, parquet_rows, release
from sim.costs.collective_tables import fit_alpha_beta

PHASES = ("dispatch", "combine")
RANKS_PER_NODE = 8


class Exchange(NamedTuple):
    """One dispatch or combine."""

    phase: str
    """`dispatch` or `combine`."""
    num_nodes: int
    tokens: int
    """Of each rank."""
    top_k: int
    hidden: int
    seconds: float

    @property
    def payload_bytes(self) -> int:
        """What one rank sends, its own share included."""
        return exchanged_bytes(self.phase, self.tokens, self.top_k, self.hidden)


def exchanged_bytes(phase: str, tokens: int, top_k: int, hidden: int) -> int:
    """Bytes that one rank sends in a phase.

    Raises:
        ValueError: the phase is not known.
    """
    if phase not in PHASES:
        raise ValueError(f"phase={phase!r} is not known; there are: {', '.join(PHASES)}")
    value_bytes = hidden + hidden // 128 * 4 if phase == "dispatch" else 2 * hidden
    return tokens * top_k * value_bytes


@dataclass(frozen=True, slots=True)
class ExpertLinks:
    """The hops of one phase on nodes of eight GPUs."""

    inside: Hop
    between: Hop

    def seconds(self, payload_bytes: float, num_nodes: int) -> float:
        """Seconds of an exchange on an idle network."""
        group = Group(RANKS_PER_NODE, num_nodes, self.inside, self.between)
        return collective_s("all_to_all", payload_bytes, group, "direct")

    def with_gpu_link(self, ratio: float, reached_bytes_per_s: float) -> "ExpertLinks":
        """The same with GPU links of another bandwidth.

        A phase that keeps the link less busy than another is held up by its own work (combine adds
        up), which a slower link does not slow down until the link itself holds it up.

        Args:
            ratio: bandwidth of the other link over that of this one.
            reached_bytes_per_s: what the busiest phase gets out of this one.
        """
        other = min(self.inside.bytes_per_s, ratio * reached_bytes_per_s)
        return replace(self, inside=replace(self.inside, bytes_per_s=other))


def read_deepep(gpu: str) -> list[Exchange]:
    """The low-latency exchanges that aiconfigurator-core has of a GPU.

    Of several versions the one that was measured on most nodes, and of those the newest.

    Raises:
        ValueError: DeepEP was not measured on the GPU.
    """
    by_version: dict[str, list[Exchange]] = {}
    for file in comm_files(gpu, "*/*/wideep_deepep_ll_perf.parquet"):
        for cells in parquet_rows(file):
            rows = by_version.setdefault(str(cells["version"]), [])
            nodes, tokens = int(cells["node_num"]), int(cells["num_token"])
            top_k, hidden = int(cells["num_topk"]), int(cells["hidden_size"])
            for phase in PHASES:
                seconds = float(cells[f"{phase}_avg_t_us"]) * 1e-6
                rows.append(Exchange(phase, nodes, tokens, top_k, hidden, seconds))
    if not by_version:
        raise ValueError(f"DeepEP was not measured on gpu={gpu!r}; h100_sxm has it")

    def rank(version: str) -> tuple[int, tuple[int, ...]]:
        return max(row.num_nodes for row in by_version[version]), release(version)

    return by_version[max(by_version, key=rank)]


def fit_expert_links(rows: Iterable[Exchange], phase: str) -> ExpertLinks:
    """The hops of a phase: from one node the inner, from several the outer.

    Raises:
        ValueError: there are no rows of one node, or none of several.
    """
    chosen = [row for row in rows if row.phase == phase]
    return ExpertLinks(
        _hop([row for row in chosen if row.num_nodes == 1], "one node"),
        _hop([row for row in chosen if row.num_nodes > 1], "several nodes"),
    )


def _hop(rows: Sequence[Exchange], where: str) -> Hop:
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} exchanges on {where} are too few to fit; give two or more")
    ranks = [RANKS_PER_NODE * row.num_nodes for row in rows]
    others = [
        RANKS_PER_NODE - 1 if row.num_nodes == 1 else count - RANKS_PER_NODE
        for row, count in zip(rows, ranks, strict=True)
    ]
    shares = np.array(others) / np.array(ranks)
    sent = [row.payload_bytes * share for row, share in zip(rows, shares, strict=True)]
    fit = fit_alpha_beta(sent, [row.seconds for row in rows])
    return Hop(fit.latency_s, 1 / fit.s_per_byte)
