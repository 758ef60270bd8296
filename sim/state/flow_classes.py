"""Flows that must fare alike, found from the links they cross.

Colour refinement: flows with the same colours of links, and links of one capacity with the same
colours of flows, end up in one class (the coarsest equitable partition). Progressive filling sees
nothing but those colours, so all flows of a class have one max-min rate, and removing a whole
class leaves the others equitable. A million flows of a symmetric pattern become a handful of
classes.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.intp]
FloatArray = NDArray[np.float64]
Hashes = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Classes:
    """Which class every flow and every link belongs to."""

    of_flow: IntArray
    """Class of every flow, numbered from 0."""
    links: IntArray
    """The links that are crossed at all, increasing."""
    of_link: IntArray
    """Class of each of these, numbered from 0."""


def flow_classes(paths: IntArray, sizes: FloatArray, capacity: FloatArray) -> Classes:
    """The coarsest classes of flows and links that fare alike.

    Args:
        paths: links of every flow, filled up with -1. Shape: flows, hops.
        sizes: bytes of every flow; flows of different size are never in one class.
        capacity: of every link there is, by number.
    """
    used = paths >= 0
    links, local = np.unique(paths[used], return_inverse=True)
    columns = np.full(paths.shape, len(links), np.intp)  # one past the end: no link
    columns[used] = local
    rows = np.nonzero(used)[0]
    flows = _numbered(sizes)
    of_link = _numbered(capacity[links])
    count = (int(flows.max(initial=-1)), int(of_link.max(initial=-1)))
    while True:
        link_hash = np.append(_hashes(of_link), np.uint64(0))
        flows = _numbered(_hashes(flows) * np.uint64(3) + link_hash[columns].sum(axis=1))
        sums = np.zeros(len(links), np.uint64)
        np.add.at(sums, local, _hashes(flows)[rows])
        of_link = _numbered(_hashes(of_link) * np.uint64(3) + sums)
        grown = (int(flows.max(initial=-1)), int(of_link.max(initial=-1)))
        if grown == count:
            return Classes(flows, links, of_link)
        count = grown


def _numbered(values: FloatArray | Hashes) -> IntArray:
    return np.unique(values, return_inverse=True)[1].astype(np.intp)


def _hashes(colours: IntArray) -> Hashes:
    """Far-apart numbers for small ones (splitmix64), so that their sums tell multisets apart."""
    mixed = (colours.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
