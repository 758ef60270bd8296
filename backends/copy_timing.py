"""Times copies between the two tiers of a knowledge cache."""

import statistics
import time

from backends.knowledge_store import HostArena
from backends.kv_cache import PagedKVCache
from backends.transformer import synchronise


def copy_seconds(cache: PagedKVCache, blocks: int, rounds: int) -> tuple[int, float]:
    """Bytes of so many blocks, and the median seconds of copying them, both ways pooled.

    Args:
        cache: the tier on the device; what its blocks hold is overwritten.
        blocks: copied at a time.
        rounds: copies each way, after one that warms up.
    """
    host = HostArena(cache, blocks)
    device = cache.layers[0][0].device
    there = list(range(blocks))
    spent_s: list[float] = []
    for _ in range(rounds + 1):
        synchronise(device)
        start = time.perf_counter()
        slots = host.keep(there)
        synchronise(device)
        between = time.perf_counter()
        host.bring(slots, there)
        synchronise(device)
        spent_s += [between - start, time.perf_counter() - between]
        host.release(slots)
    return host.bytes_out // (rounds + 1), statistics.median(spent_s[2:])
