"""What plots and trace viewers draw of a trace: step curves of counts, and bars of iterations."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.trace import DECODE, PREFILL, State, Trace

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

KIND_NAMES = {PREFILL: "prefill", DECODE: "decode", PREFILL | DECODE: "mixed"}
"""Kinds of an iteration: prompts only, answers only, or both in one batch."""


class Steps(NamedTuple):
    """A quantity that changes at instants and stays in between."""

    instant_s: Floats
    value: Ints


class Counts(NamedTuple):
    """How full a replica, or all replicas together, is over time."""

    running: Steps
    """Requests that hold KV."""
    waiting: Steps
    """Requests in the queue."""
    free_blocks: Steps
    """KV blocks that nobody holds, as observed at each decision."""


def counts(trace: Trace) -> Counts:
    """Running and waiting requests and free KV blocks over the whole trace."""
    events = trace.events
    instant_s, state = np.asarray(events["instant_s"], np.float64), events["state"]
    seated = state == State.admitted
    torn = _lost_their_seat(trace)
    over = state == State.handed_over
    left = (state == State.preempted) | (state == State.finished) | torn | over
    arrival_s = np.asarray(trace.requests["arrival_s"], np.float64)
    back = (state == State.preempted) | torn  # to a queue, be it the router's
    # Or to that of another replica, if the trace is of both.
    back |= over & np.isin(events["request"], trace.hand_overs["request"])
    queue_s = np.concatenate((arrival_s, instant_s[seated], instant_s[back]))
    queue = np.repeat([1, -1, 1], [len(arrival_s), int(seated.sum()), int(back.sum())])
    return Counts(
        running=_steps(instant_s, seated.astype(np.int64) - left),
        waiting=_steps(queue_s, queue),
        free_blocks=_free_blocks(trace),
    )


def _lost_their_seat(trace: Trace) -> NDArray[np.bool_]:
    """Which events are of a request that ran on a replica when that died; others waited there."""
    state = trace.events["state"]
    order = np.lexsort((np.arange(len(state)), trace.events["request"]))
    before = np.append(0, state[order][:-1])
    ran = (before == State.admitted) | (before == State.decoding)
    found = np.zeros(len(state), np.bool_)
    found[order] = (state[order] == State.lost) & ran
    return found


def _free_blocks(trace: Trace) -> Steps:
    """As observed at each decision; the sum over all replicas."""
    if len(trace.steps["instant_s"]):  # each observation is of all elastic instances
        return Steps(trace.steps["instant_s"], trace.steps["free_slots"])
    decisions = trace.decisions
    instant_s = np.asarray(decisions["instant_s"], np.float64)
    free = np.asarray(decisions["free_blocks"], np.int64)
    starts = np.flatnonzero(np.diff(decisions["replica"], prepend=-1))
    if len(starts) < 2:
        return Steps(instant_s, free)
    # Rows lie replica by replica; before its first decision a replica is as it was found then.
    change = np.diff(free, prepend=0)
    change[starts] = 0
    steps = _steps(instant_s, change)
    return Steps(steps.instant_s, steps.value + free[starts].sum())


def batch_sizes(trace: Trace) -> Ints:
    """Requests in each iteration: those that prefill and those that decode."""
    decisions = trace.decisions
    sizes = np.asarray(decisions["num_prefills"] + decisions["num_decodes"], np.int64)
    return np.repeat(sizes, decisions["repeat"])


def end_s(trace: Trace) -> float:
    """End of the last iteration."""
    return float(trace.iterations["end_s"].max()) if trace.num_iterations else 0.0


def legible_window(trace: Trace, iterations: int = 120) -> tuple[float, float]:
    """A stretch of so many iterations in mid-run: few enough that each bar can be seen.

    Of the stretches tried, the one with most changes between kinds: a long row of equal decode
    iterations shows nothing.
    """
    kinds = trace.iterations["kind"]
    start_s, stop_s = trace.iterations["start_s"], trace.iterations["end_s"]
    if len(kinds) <= iterations:
        return float(start_s.min()), float(stop_s.max())
    changes = np.append(0, np.cumsum(np.diff(kinds) != 0))
    first = np.arange(len(kinds) // 4, max(3 * len(kinds) // 4 - iterations, 0) + 1)
    if not len(first):
        first = np.zeros(1, np.int64)
    last = np.minimum(first + iterations - 1, len(kinds) - 1)
    best = int(np.argmax(changes[last] - changes[first]))
    return float(start_s[first[best]]), float(stop_s[last[best]])


def _steps(instant_s: Floats, change: Ints) -> Steps:
    """The running sum of changes; changes of one instant make one step."""
    if not len(instant_s):
        return Steps(np.zeros(1), np.zeros(1, np.int64))
    order = np.argsort(instant_s, kind="stable")
    at, total = instant_s[order], np.cumsum(change[order])
    last = np.append(at[1:] != at[:-1], True)
    return Steps(at[last], total[last].astype(np.int64))
