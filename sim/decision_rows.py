"""The decisions of a trace in forms that compare: merged to canonical rows, or one by one.

A panel may log a standing decision as one row or as many: that is a matter of its speed. Canonical
rows are the longest possible ones, so two logs of the same decisions have equal canonical rows.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.trace import Ragged, Trace


class Observed(NamedTuple):
    """What a panel saw of itself before a decision."""

    free_blocks: int
    waiting: int
    context_tokens: int
    """Tokens whose KV is stored, of all running requests."""
    cached_blocks: int = 0
    """Free blocks that hold a cached prefix."""


class Decision(NamedTuple):
    """One decision: the work of one iteration."""

    instant_s: float
    admitted: tuple[int, ...]
    preempted: tuple[int, ...]
    tokens: Mapping[int, int]
    """Tokens that the iteration computes, by request. Rows of one stretch share the mapping."""
    observed: Observed | None
    """None within a stretch that its panel logged as one row: nobody looked."""
    reused: tuple[tuple[int, int], ...] = ()
    """(request, tokens): what the prefix cache spared the admitted requests."""


def canonical(trace: Trace) -> Trace:
    """The trace with every stretch of equal decode-only decisions as one row.

    Consecutive rows merge when neither admits, pre-empts or prefills anything and the later one
    decodes the same requests. A merged row keeps the instant and the observations of its first.

    Args:
        trace: of one replica.
    """
    lists = trace.decision_lists
    repeat = trace.decisions["repeat"]
    if not len(repeat):
        return trace
    idle = ~(_any(lists, "admitted") | _any(lists, "preempted") | _any(lists, "prefilled"))
    same = ~(_any(lists, "joined") | _any(lists, "left"))
    starts = np.append(True, ~(idle[1:] & idle[:-1] & same[1:]))
    first = np.flatnonzero(starts)
    decisions = {name: column[first] for name, column in trace.decisions.items()}
    decisions["repeat"] = np.add.reduceat(repeat, first)
    # Rows that go have empty lists, so the values stay and only their offsets are fewer.
    merged = {
        name: Ragged(ragged.offsets[np.append(first, len(repeat))], ragged.values)
        for name, ragged in lists.items()
    }
    return replace(trace, decisions=decisions, decision_lists=merged)


def expand(trace: Trace) -> list[Decision]:
    """Every decision of a trace, repeats one by one, with the tokens of each request.

    Args:
        trace: of one replica.

    Raises:
        ValueError: a row decodes another number of requests than its joined and left lists say, or
            the rows stand for another number of iterations than there are.
    """
    if trace.num_decisions != trace.num_iterations:
        raise ValueError(
            f"decisions stand for {trace.num_decisions} iterations and the trace has "
            f"{trace.num_iterations}; both must be equal: the executor's log is broken"
        )
    rows = {name: column.tolist() for name, column in trace.decisions.items()}
    starts_s = trace.iterations["start_s"].tolist()
    lists = trace.decision_lists
    decoding: dict[int, int] = {}
    decisions: list[Decision] = []
    for index, repeat in enumerate(rows["repeat"]):
        _update(decoding, lists, index, rows["num_decodes"][index])
        tokens = dict(decoding) if rows["num_decodes"][index] else {}
        tokens.update(_pairs(lists, "prefilled", index))
        decision = Decision(
            rows["instant_s"][index],
            tuple(lists["admitted"].row(index)),
            tuple(lists["preempted"].row(index)),
            tokens,
            Observed(*(rows[name][index] for name in Observed._fields)),
            tuple(_pairs(lists, "reused", index)),
        )
        decisions.append(decision)
        for _ in range(repeat - 1):
            instant_s = starts_s[len(decisions)]
            decisions.append(decision._replace(instant_s=instant_s, observed=None))
    return decisions


def _pairs(lists: Mapping[str, Ragged], name: str, index: int) -> Iterable[tuple[int, int]]:
    """Requests of one list of a row, each with its tokens."""
    return zip(lists[name].row(index), lists[f"{name}_tokens"].row(index), strict=True)


def _update(
    decoding: dict[int, int], lists: Mapping[str, Ragged], index: int, num_decodes: int
) -> None:
    """Bring the set of decoding requests to one row; each takes one token."""
    for request_id in lists["left"].row(index):
        if decoding.pop(request_id, 0) == 0:
            raise ValueError(
                f"request {request_id} leaves the decodes at decision row {index} and was not "
                "among them; the executor's log is broken"
            )
    decoding.update(dict.fromkeys(lists["joined"].row(index), 1))
    if num_decodes not in (0, len(decoding)):
        raise ValueError(
            f"decision row {index} decodes num_decodes={num_decodes} requests, and "
            f"{len(decoding)} have joined; both must be equal: the executor's log is broken"
        )


def _any(lists: Mapping[str, Ragged], name: str) -> NDArray[np.bool_]:
    """Which rows have something in one of their lists."""
    return lists[name].counts() > 0
