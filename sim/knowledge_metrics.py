"""Figures of a run whose requests have documents retrieved, from its trace: on both panels."""

import numpy as np
from numpy.typing import NDArray

from sim.generations import GIVEN_UP, LOST
from sim.knowledge_rules import TO_HOST
from sim.state.knowledge_tree import MoveKind
from sim.trace import Trace

NAMES = (
    "document_hit_share", "gpu_hit_share", "host_hit_share", "kv_bytes_swapped_out",
    "kv_bytes_loaded", "num_speculations_stopped", "num_clients_left", "num_gpu_losses",
)  # fmt: skip


def knowledge_figures(trace: Trace, block_bytes: int) -> dict[str, float]:
    """What was found cached, what was copied, what was computed in vain, and what went wrong.

    The hit share is RAGCache's hit rate: documents that a generation found cached over documents
    that it has, of the generations that answered. Not a number where nothing is retrieved.

    Args:
        trace: of one run.
        block_bytes: KV of a block.
    """
    if not len(trace.searches["request"]):
        return dict.fromkeys(NAMES, float("nan"))
    lookups, moves = trace.lookups, trace.moves
    answered = np.isin(lookups["request"], trace.searches["generation"])
    gpu, host, missed = (
        int(lookups[name][answered].sum())
        for name in ("gpu_documents", "host_documents", "missed_documents")
    )
    retrieved = max(gpu + host + missed, 1)
    out = moves["blocks"][np.isin(moves["kind"], TO_HOST)].sum()
    back = moves["blocks"][moves["kind"] == MoveKind.load].sum()
    found = trace.stages["stage"] >= 0
    figures = (
        (gpu + host) / retrieved, gpu / retrieved, host / retrieved, int(out) * block_bytes,
        int(back) * block_bytes, int((found & (trace.stages["stopped"] >= 0)).sum()),
        clients_left(trace), int((trace.stages["stage"] == LOST).sum()),
    )  # fmt: skip
    return dict(zip(NAMES, figures, strict=True))


def clients_left(trace: Trace) -> int:
    """Clients that left before they had their full answer."""
    return int((trace.stages["stage"] == GIVEN_UP).sum())


def mean_search_s(trace: Trace, generations: NDArray[np.int64]) -> float:
    """From arrival to the end of the search, of the requests that these generations answer."""
    searches = trace.searches
    mine = np.isin(searches["generation"], generations)
    took_s = (searches["end_s"] - searches["arrival_s"])[mine]
    return float(took_s.mean()) if len(took_s) else float("nan")
