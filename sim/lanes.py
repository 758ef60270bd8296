"""A replica's lanes: how many batches it has in flight, and what each of them may use.

Each lane is a batching instance of its own with a share of the seats and of the KV pool, as the
virtual engines of vLLM are. In a trace lanes are numbered as replicas are, first lanes first.
"""

from collections.abc import Mapping

import numpy as np

from sim.engine import ReplicaLimits
from sim.trace import Array


def num_lanes(batches_in_flight: int | None, pp_size: int, *, one_for: str = "") -> int:
    """Batches that one replica has in flight.

    Args:
        batches_in_flight: what was asked for; None: one a stage.
        pp_size: stages of the replica.
        one_for: what is simulated for one batch a replica only; empty: nothing of the kind.

    Raises:
        ValueError: more batches than stages, or several where there may be one.
    """
    if one_for:
        if batches_in_flight not in {None, 1}:
            raise ValueError(
                f"engine.batches_in_flight={batches_in_flight} must be 1 or null with {one_for}, "
                "which know replicas of one batch in flight only"
            )
        return 1
    lanes = pp_size if batches_in_flight is None else batches_in_flight
    if lanes > pp_size:
        raise ValueError(
            f"engine.batches_in_flight={lanes} must not exceed pp_size={pp_size}: a stage computes "
            "one batch at a time, so that more would only wait; lower it, or set it to null"
        )
    return lanes


def lane_limits(limits: ReplicaLimits, lanes: int) -> ReplicaLimits:
    """The limits of one lane: its share of seats and blocks, and the whole token budget.

    Raises:
        ValueError: there are fewer KV blocks than lanes.
    """
    num_blocks = limits.num_blocks // lanes
    if num_blocks < 1:
        raise ValueError(
            f"num_blocks={limits.num_blocks} KV blocks do not give one to each of {lanes} batches "
            "in flight; raise engine.num_blocks or lower engine.batches_in_flight"
        )
    return limits._replace(max_num_seqs=max(limits.max_num_seqs // lanes, 1), num_blocks=num_blocks)


def covered_s(iterations: Mapping[str, Array], num_replicas: int) -> float:
    """Seconds in which an iteration ran, added up over replicas; lanes that overlap count once.

    Args:
        iterations: of a trace in which lane l of replica r has the number l * num_replicas + r.
        num_replicas: how many there are.
    """
    total_s = 0.0
    for replica in range(num_replicas):
        mine = iterations["replica"] % num_replicas == replica
        start_s, end_s = iterations["start_s"][mine], iterations["end_s"][mine]
        order = np.argsort(start_s, kind="stable")
        start_s, end_s = start_s[order], end_s[order]
        before_s = np.maximum.accumulate(np.append(-np.inf, end_s))[:-1]
        total_s += float(np.maximum(end_s - np.maximum(start_s, before_s), 0.0).sum())
    return total_s
