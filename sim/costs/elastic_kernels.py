"""Groups of instances from the kernels of one: what is shared out, and what goes over the links.

LoongServe (arXiv 2404.09526, section 4): a prefill's tokens and pairs are shared out evenly, and
KV blocks go round a ring behind attention; of a decode iteration each member reads the KV that it
has, masters compute everything else, and queries and partial results go to and fro in every layer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.costs.base import IterationCost, decode_shape
from sim.costs.elastic import DecodeWork
from sim.models.flops import causal_pairs
from sim.models.work import IterationShape


class Exchange(NamedTuple):
    """What members of a group send each other, over the link of one rank to another's."""

    num_layers: int
    latency_s: float
    """Of one message."""
    bytes_per_s: float
    kv_bytes: float
    """KV of one token in one layer, on one rank."""
    query_bytes: float
    """Query of one token in one layer on one rank, and what comes back for it."""


class KernelGroups:
    """An `ElasticCost` from the cost of one instance."""

    def __init__(self, cost: IterationCost, exchange: Exchange) -> None:
        self._cost, self._exchange = cost, exchange

    def prefill_s(self, degree: int, lengths: Sequence[int]) -> float:
        """See `ElasticCost`. In its turns a member reads all KV; a slower ring is waited for."""
        tokens, pairs = sum(lengths), sum([causal_pairs(one, 0) for one in lengths])
        share = -(-tokens // degree)
        count = len(lengths)
        shape = IterationShape(share, -(-pairs // degree), tokens, count, 0, 0, count)
        whole_s = self._cost.iteration_s(shape)
        if degree == 1:
            return whole_s
        without_s = self._cost.iteration_s(shape._replace(prefill_pairs=0, prefill_context=0))
        one = self._exchange
        message_s = one.latency_s + share * one.kv_bytes / one.bytes_per_s
        ring_s = one.num_layers * (degree - 1) * message_s
        attention_s = (whole_s - without_s) * (degree - 1) / degree
        return whole_s + max(ring_s - attention_s, 0.0)

    def round_run_s(self, groups: Sequence[DecodeWork], rounds: int) -> NDArray[np.float64]:
        """See `ElasticCost`."""
        slowest = np.zeros(rounds)
        for group in groups:
            slowest = np.maximum(slowest, self._group_s(group, rounds))
        return slowest

    def _group_s(self, group: DecodeWork, rounds: int) -> NDArray[np.float64]:
        """Members work at the same time; with several, two messages a layer go between them."""
        most = np.zeros(rounds)
        for tokens, growth in zip(group.tokens, group.growth, strict=True):
            most = np.maximum(most, self._member_s(group, tokens, growth, rounds))
        if len(group.tokens) == 1:
            return most
        one = self._exchange
        query_s = max(group.mini_batches) * one.query_bytes / one.bytes_per_s
        return most + one.num_layers * (2 * one.latency_s + query_s)

    def _member_s(
        self, group: DecodeWork, tokens: int, growth: int, rounds: int
    ) -> NDArray[np.float64]:
        """Attention over its KV, and if it is a master, the rest of its mini-batch."""
        count = group.num_requests
        steps = [tokens + growth * step for step in range(1, rounds + 1)]
        # Growth may be nothing, which a decode stretch of the cost never is.
        reads = [
            self._cost.iteration_s(decode_shape(count, context)) if context else 0.0
            for context in steps
        ]
        empty_s = self._cost.iteration_s(decode_shape(count, 0))
        own_s = self._cost.iteration_s(decode_shape(growth, 0)) if growth else 0.0
        return np.array([max(read_s - empty_s, 0.0) + own_s for read_s in reads])
