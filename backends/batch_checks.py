"""What a policy may not ask of a real replica, in the words in which the simulated one refuses it.

The twin of the refusals in `sim/state/replica_state.py` and `sim/processes/replica.py`.
"""

from collections.abc import Iterable, Mapping

from backends.forward_batch import Chunk
from backends.kv_cache import PagedKVCache
from backends.observed import Sequence
from sim.engine import ReplicaLimits
from sim.policies.batching.base import DECODE, Batch
from sim.requests import RequestView


def require_running(request_id: int, seated: Mapping[int, Sequence]) -> None:
    """Refuse to pre-empt a request without a seat."""
    if request_id not in seated:
        raise ValueError(f"request {request_id} is pre-empted and does not run")


def waiting_view(request_id: int, waiting: Iterable[RequestView]) -> RequestView:
    """The waiting request of that number.

    Raises:
        ValueError: there is none.
    """
    for view in waiting:
        if view.request_id == request_id:
            return view
    raise ValueError(f"request {request_id} is admitted and does not wait")


def check_prefill(prefill: tuple[tuple[int, int], ...], seated: Mapping[int, Sequence]) -> None:
    """Refuse two chunks of one request, and a chunk that is empty or more than what is left."""
    if len(dict(prefill)) < len(prefill):
        raise ValueError("a request is to prefill two chunks at once")
    for request_id, tokens in prefill:
        left = seated[request_id].prefill_left if request_id in seated else 0
        if not 0 < tokens <= left:
            raise ValueError(
                f"request {request_id} is to prefill {tokens} tokens and has {left} left"
            )


def blocks_needed(chunks: list[Chunk], cache: PagedKVCache) -> int:
    """Blocks that the tokens of chunks take beside those that their requests have."""
    return sum(
        [cache.blocks_needed(chunk.request_id, chunk.start + len(chunk.token_ids))
         for chunk in chunks]
    )  # fmt: skip


def check_room(
    batch: Batch, chunks: list[Chunk], num_seated: int, cache: PagedKVCache, limits: ReplicaLimits
) -> None:
    """Refuse a batch that computes nothing, or takes more seats or blocks than there are."""
    if not chunks:
        raise ValueError("it moves requests but computes nothing")
    needed = blocks_needed(chunks, cache)
    # Few steps need a block, so the pool is rarely counted.
    short_of_blocks = needed > 0 and needed > cache.free_blocks
    if batch == DECODE and short_of_blocks:
        raise ValueError("a decode takes more blocks than are free")
    if short_of_blocks or num_seated > limits.max_num_seqs:
        raise ValueError("it takes more blocks or seats than there are")
