"""Which documents a request retrieves, and what its search shows before it is done.

Assumptions of ours, as RAGCache (TOCS 2025) does not say how the documents of one request go
together: the first is its topic, drawn by popularity; the others come from a few companions that
each topic has, drawn by popularity once and for all. So pairs repeat, and every rank is as skewed.
"""

import numpy as np
from numpy.typing import NDArray

from sim.workload.mixing import mixed
from sim.workload.zipf import Zipf

Whole = NDArray[np.int64]


class Companions:
    """The companions of every topic, made when they are asked for.

    Args:
        zipf: popularity of the documents; a document's number is its rank.
        num_documents: how many there are, one at least.
        neighbours: companions of a topic; fewer where there are fewer other documents.
        key: whatever random number makes them those of one seed.
        drifts: whether documents become the most popular one after another, from the last number
            down. The companions of such a topic are those popular when it comes up.
    """

    def __init__(
        self, zipf: Zipf, num_documents: int, neighbours: int, key: int, *, drifts: bool = False
    ) -> None:
        self._drifts = drifts
        self._zipf = zipf
        self._num_documents = num_documents
        self.count = min(neighbours, num_documents - 1)
        self._slots = np.arange(self.count, dtype=np.uint64)
        self._key = np.array([key], dtype=np.uint64)

    def of(self, topics: Whole) -> Whole:
        """The companions of each topic, shape (topics, self.count): all different, none itself."""
        numbers = mixed(mixed(self._key + topics.astype(np.uint64))[:, None] + self._slots)
        drawn = self._zipf.ranks((numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53)
        if self._drifts:
            count = self._num_documents
            came_up = np.where(topics > count // 2, count - topics, 0)
            drawn = (drawn - came_up[:, None]) % count
        return distinct(drawn, topics[:, None], self._num_documents)[:, 1:]


def distinct(drawn: Whole, kept: Whole, count: int) -> Whole:
    """`kept` and `drawn` side by side, where a number that a row has already becomes the next one.

    The next number wraps around at `count`, so that the marginal of uniform numbers stays uniform
    and a popular document gives way to one as popular.

    Args:
        drawn: shape (rows, more), from 0 to below `count`; it may repeat.
        kept: shape (rows, some), no number twice in a row. Not changed, nor is `drawn`.
        count: how many numbers there are, at least `some + more`.
    """
    num_kept = kept.shape[1]
    found = np.concatenate((kept, drawn), axis=1)
    for at in range(num_kept, found.shape[1]):
        before = found[:, :at]
        clash = np.flatnonzero((before == found[:, at, None]).any(axis=1))
        while len(clash):
            found[clash, at] = (found[clash, at] + 1) % count
            clash = clash[(before[clash] == found[clash, at, None]).any(axis=1)]
    return found


def stage_lists(answers: Whole, others: Whole, found_at: Whole, num_stages: int) -> list[Whole]:
    """What the search shows after each stage.

    The documents of the answer that have been found, by rank, then as many others as there is room.

    Args:
        answers: shape (requests, top_k), by rank.
        others: candidates that fill the room, shape (requests, top_k); nothing of the answer. One
            column at least unless all is found in the first stage.
        found_at: the stage in which each document of the answer is found, shape as `answers`.
        num_stages: how many stages there are.

    Returns:
        A list of num_stages arrays, each of shape (requests, top_k).
    """
    top_k = answers.shape[1]
    both = np.concatenate((answers, others), axis=1)
    lists: list[Whole] = []
    for stage in range(num_stages):
        late = np.zeros(both.shape, dtype=np.bool_)
        late[:, :top_k] = found_at > stage
        # A stable sort of "not yet found" moves the rest up and keeps its order.
        order = np.argsort(late, axis=1, kind="stable")[:, :top_k]
        lists.append(np.take_along_axis(both, order, axis=1))
    return lists
