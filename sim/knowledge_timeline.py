"""Where the TTFT of single requests went that had documents retrieved: what pictures of it draw."""

from enum import Enum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.generations import MAX_STAGES
from sim.metrics import RequestTimes, request_times
from sim.trace import Trace


class Found(Enum):
    """Where all documents of a request were when it was admitted."""

    miss = "miss"
    host_hit = "host hit"
    gpu_hit = "GPU hit"


class Path(NamedTuple):
    """The way of one request to its first token (seconds after its arrival)."""

    request: int
    searched_s: float
    """End of its search."""
    admitted_s: float
    """It had a seat; earlier than the end of its search where it was prefilled ahead of it."""
    copied_s: float
    """Copies of the batch that it was admitted with were over."""
    first_token_s: float

    @property
    def queue_s(self) -> float:
        """Wait for a seat."""
        return max(self.admitted_s - self.searched_s, 0.0)


def paths(trace: Trace) -> dict[Found, dict[int, Path]]:
    """Of all requests whose documents were in one place, by place and request."""
    times = request_times(trace)
    found = _found(trace, times)
    found_paths: dict[Found, dict[int, Path]] = {kind: {} for kind in Found}
    copied = _copy_s(trace, times.scheduled_s)
    searched_s = dict(
        zip(trace.searches["generation"].tolist(), trace.searches["end_s"].tolist(), strict=True)
    )
    for row, generation in enumerate(times.request.tolist()):
        kind = found.get(generation)
        if kind is None:
            continue
        arrival_s, admitted_s = float(times.arrival_s[row]), float(times.scheduled_s[row])
        found_paths[kind][generation // MAX_STAGES] = Path(
            generation // MAX_STAGES,
            searched_s[generation] - arrival_s,
            admitted_s - arrival_s,
            admitted_s + float(copied[row]) - arrival_s,
            float(times.first_token_s[row]) - arrival_s,
        )
    return found_paths


def clearest(traces: tuple[Trace, Trace]) -> dict[Found, tuple[Path, Path]]:
    """For each place the request that waited least, among those that both traces found there."""
    ours, theirs = map(paths, traces)
    chosen: dict[Found, tuple[Path, Path]] = {}
    for kind in Found:
        both = sorted(ours[kind].keys() & theirs[kind].keys())
        if both:
            pairs = [(ours[kind][one], theirs[kind][one]) for one in both]
            chosen[kind] = min(pairs, key=lambda pair: pair[0].queue_s + pair[1].queue_s)
    return chosen


def _found(trace: Trace, times: RequestTimes) -> dict[int, Found]:
    """Where all documents of each answering generation were."""
    lookups = trace.lookups
    columns = ("request", "gpu_documents", "host_documents", "missed_documents")
    answered = set(times.request.tolist())
    found: dict[int, Found] = {}
    for generation, *counts in zip(*(lookups[name].tolist() for name in columns), strict=True):
        gpu, host, missed = (count > 0 for count in counts)
        if generation in answered and gpu + host + missed == 1:
            found[generation] = (
                Found.gpu_hit if gpu else Found.host_hit if host else Found.miss
            )  # fmt: skip
    return found


def _copy_s(trace: Trace, admitted_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """Seconds of the copies that were made with the batches of these instants."""
    instants, where = np.unique(trace.moves["instant_s"], return_inverse=True)
    if not len(instants):
        return np.zeros(len(admitted_s))
    sums = np.bincount(where, trace.moves["took_s"])
    at = np.minimum(np.searchsorted(instants, admitted_s), len(instants) - 1)
    return np.where(instants[at] == admitted_s, sums[at], 0.0)
