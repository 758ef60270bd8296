"""One trace of a replica's lives: what it did before each of its deaths, and since."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sim.trace import ANSWERS, HAND_OVERS, ROUTES, Ragged, State, Trace, empty
from sim.trace_merge import merge


def joined_lives(lives: Sequence[Trace]) -> Trace:
    """The trace of one replica.

    A life begins with nobody decoding, so its first decision notes that those who decoded at the
    end of the one before have left. Of the requests only those that it answered are kept: the
    others are another replica's, or another life's.

    Args:
        lives: in order of time; not changed.
    """
    kept: list[Trace] = []
    decoding: set[int] = set()
    for life in map(_answered_here, lives):
        if not life.num_iterations:
            kept.append(life)
            continue
        lists = dict(life.decision_lists)
        lists["left"] = _with_first(lists["left"], sorted(decoding))
        kept.append(replace(life, decision_lists=lists))
        decoding = _decoding_at_the_end(life)
    return merge(kept, empty(ROUTES), empty(ANSWERS), empty(HAND_OVERS))


def _answered_here(life: Trace) -> Trace:
    done = life.events["request"][life.events["state"] == State.finished]
    mine = np.isin(life.requests["request"], done)
    return replace(life, requests={name: column[mine] for name, column in life.requests.items()})


def _with_first(ragged: Ragged, values: list[int]) -> Ragged:
    """The lists with some values before those of the first row."""
    offsets = ragged.offsets + len(values)
    offsets[0] = 0
    return Ragged(offsets, np.concatenate((np.array(values, np.int64), ragged.values)))


def _decoding_at_the_end(life: Trace) -> set[int]:
    """Who decoded in the last iteration. A request may have joined and left several times."""
    joined, left = (life.decision_lists[name].values for name in ("joined", "left"))
    ids = np.unique(np.concatenate((joined, left)))
    net = np.zeros(len(ids), np.int64)
    np.add.at(net, np.searchsorted(ids, joined), 1)
    np.add.at(net, np.searchsorted(ids, left), -1)
    return set(ids[net > 0].tolist())
