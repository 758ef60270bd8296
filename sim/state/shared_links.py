"""Who sends how fast over which links, by classes of flows that fare alike.

A change (flows begin, finish or are dropped, a capacity changes) touches links; rates are computed
again for the flows that those links connect, and for no others. Classes are found when flows
begin; they stay valid when a whole class finishes, and are found again only where a change tells
members apart.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from typing import NamedTuple

import numpy as np

from sim.state.flow_classes import flow_classes
from sim.state.links import NO_LINK, FloatArray, IntArray, widened
from sim.state.max_min import max_min_rates

FEW = 8
"""So many flows that begin at once are not searched for classes, if no class is to be split."""


class Flows(NamedTuple):
    """Flows that begin at one instant."""

    paths: IntArray
    """Links of every flow, filled up with -1. Shape: flows, hops."""
    sizes: FloatArray
    """Bytes that each has to send."""
    owners: IntArray
    """Number of the transfer that each is part of."""

    def of(self, members: IntArray | slice) -> "Flows":
        """Some of these flows."""
        return Flows(self.paths[members], self.sizes[members], self.owners[members])


@dataclass(eq=False, slots=True)
class FlowClass:
    """Flows with one rate and the same bytes left."""

    flows: Flows
    """The members; their sizes are not kept up."""
    left_bytes: float
    """What each still has to send at `since_s`."""
    since_s: float
    uses: "dict[LinkClass, float]"
    """For every class of links: flows of this class that cross each of its links."""
    rate_bytes_per_s: float = 0.0
    """Of each."""
    finish_s: float = np.inf
    """When they are done if nothing changes."""
    moved_bytes: float = 0.0
    """What each has sent since it is in this class."""


@dataclass(eq=False, slots=True)
class LinkClass:
    """Links of one capacity that are crossed by the same classes of flows."""

    links: IntArray
    capacity: float
    crossed_by: dict[FlowClass, float]
    """Flows of each class that cross each of these links."""


class SharedLinks:
    """Max-min fair sharing of links among flows that come and go."""

    def __init__(self, capacity_bytes_per_s: FloatArray) -> None:
        self.capacity = capacity_bytes_per_s.astype(np.float64)
        self.solved_classes = 0
        """Classes of flows whose rate was computed so far: the work done."""
        self._carried = np.zeros(len(self.capacity))
        self._of_link: list[LinkClass | None] = [None] * len(self.capacity)
        self._classes: dict[FlowClass, None] = {}
        self._finishes: list[tuple[float, int, FlowClass]] = []
        self._serial = count()

    @property
    def classes(self) -> list[FlowClass]:
        """The classes of flows under way."""
        return list(self._classes)

    def next_finish_s(self) -> float:
        """When the next class of flows is done; infinity if none will be."""
        if len(self._finishes) > 64 + 4 * len(self._classes):  # mostly of rates that have changed
            valid = {id(entry[2]): entry for entry in self._finishes if self._stands(entry)}
            self._finishes = sorted(valid.values())
        while self._finishes:
            if self._stands(self._finishes[0]):
                return self._finishes[0][0]
            heappop(self._finishes)
        return np.inf

    def _stands(self, entry: tuple[float, int, FlowClass]) -> bool:
        """Whether a class still finishes when it was thought to."""
        finish_s, _, flow_class = entry
        return flow_class in self._classes and flow_class.finish_s == finish_s

    def carried_bytes(self, now_s: float) -> FloatArray:
        """Bytes that each link has carried up to now."""
        total = self._carried.copy()
        for flow_class in self._classes:
            moved = flow_class.rate_bytes_per_s * (now_s - flow_class.since_s)
            for links, times in flow_class.uses.items():
                total[links.links] += times * (flow_class.moved_bytes + moved)
        return total

    def change(
        self,
        now_s: float,
        begin: Flows | None = None,
        capacities: Mapping[int, float] | None = None,
        drop: Iterable[int] = (),
    ) -> list[Flows]:
        """Bring all up to now and return the flows that are done.

        Args:
            now_s: not before the last change and not after `next_finish_s()`.
            begin: flows that begin; each crosses at least one link and has bytes to send.
            capacities: new capacity of links, by number, zero or more.
            drop: transfers whose flows end here, undone.
        """
        done: list[Flows] = []
        touched: dict[LinkClass, None] = {}
        while self.next_finish_s() <= now_s:
            finished = heappop(self._finishes)[2]
            self._advance(finished, now_s)
            touched.update(dict.fromkeys(finished.uses))
            self._remove(finished)
            done.append(finished.flows)
        dropped = set(drop)
        split = self._recapacitated(capacities or {}, touched)
        for flow_class in self._classes if dropped else ():
            if dropped.intersection(flow_class.flows.owners.tolist()):
                split.update(dict.fromkeys(flow_class.uses))
        if begin is not None and not split and self._few(begin):
            touched.update(self._single(now_s, begin))
        elif begin is not None or split:
            links = (
                [] if begin is None else _numbers(np.unique(begin.paths[begin.paths != NO_LINK]))
            )
            found = (self._of_link[link] for link in links)
            split.update({crossed: None for crossed in found if crossed is not None})
            touched.update(self._rebuild(now_s, split, begin, dropped))
        self._solve(now_s, self._connected(touched))
        return done

    def _few(self, begin: Flows) -> bool:
        """Whether flows can be classes of their own without parting any class of links."""
        if len(begin.sizes) > FEW:
            return False
        crossed = (self._of_link[link] for link in _crossed(begin))
        return all(links is None or len(links.links) == 1 for links in crossed)

    def _recapacitated(
        self, capacities: Mapping[int, float], touched: dict[LinkClass, None]
    ) -> dict[LinkClass, None]:
        """Set capacities; returns the classes of links that they part."""
        split: dict[LinkClass, None] = {}
        for link, capacity in capacities.items():
            self.capacity[link] = capacity
            links = self._of_link[link]
            if links is not None and len(links.links) == 1:
                links.capacity = capacity
                touched[links] = None
            elif links is not None:
                split[links] = None
        return split

    def _single(self, now_s: float, begin: Flows) -> dict[LinkClass, None]:
        """Make every flow a class of its own."""
        touched: dict[LinkClass, None] = {}
        for i in range(len(begin.sizes)):
            only = begin.of(slice(i, i + 1))
            uses: dict[LinkClass, float] = {}
            for link in _crossed(only):
                links = self._of_link[link]
                if links is None:
                    links = LinkClass(np.array([link]), float(self.capacity[link]), {})
                    self._of_link[link] = links
                uses[links] = uses.get(links, 0.0) + 1.0
            self._add(FlowClass(only, float(begin.sizes[i]), now_s, uses))
            touched.update(dict.fromkeys(uses))
        return touched

    def _rebuild(
        self, now_s: float, split: dict[LinkClass, None], begin: Flows | None, dropped: set[int]
    ) -> dict[LinkClass, None]:
        """Find the classes again of all flows that some links connect, and of those that begin."""
        parts = [] if begin is None else [begin]
        touched: dict[LinkClass, None] = {}
        for old in self._connected(split):
            self._advance(old, now_s)
            # Links that only dropped flows crossed end here; their like go on in new classes.
            self._remove(old)
            stays = np.array([owner not in dropped for owner in old.flows.owners.tolist()])
            left = np.full(int(stays.sum()), old.left_bytes)
            parts.append(Flows(old.flows.paths[stays], left, old.flows.owners[stays]))
        flows = joined(parts)
        if not len(flows.sizes):
            return touched
        classes = flow_classes(flows.paths, flows.sizes, self.capacity)
        link_classes: list[LinkClass] = []
        for links in _members(classes.of_link):
            numbers = classes.links[links]
            link_classes.append(LinkClass(numbers, float(self.capacity[numbers[0]]), {}))
            for link in _numbers(numbers):
                self._of_link[link] = link_classes[-1]
        for members in _members(classes.of_flow):
            uses: dict[LinkClass, float] = {}
            for link in _crossed(flows.of(members[:1])):
                links = self._of_link[link]
                assert links is not None
                uses[links] = uses.get(links, 0.0) + len(members) / len(links.links)
            size = float(flows.sizes[members[0]])
            self._add(FlowClass(flows.of(members), size, now_s, uses))
        return dict.fromkeys(link_classes)

    def _connected(self, touched: Iterable[LinkClass]) -> list[FlowClass]:
        """All classes of flows that links connect, directly or over other flows."""
        seen: dict[FlowClass, None] = {}
        known = dict.fromkeys(touched)
        queue = list(known)
        while queue:
            for flow_class in queue.pop().crossed_by:
                if flow_class not in seen:
                    seen[flow_class] = None
                    fresh = [links for links in flow_class.uses if links not in known]
                    known.update(dict.fromkeys(fresh))
                    queue += fresh
        return list(seen)

    def _solve(self, now_s: float, classes: list[FlowClass]) -> None:
        """Bring classes up to now and give them their fair rates."""
        if not classes:
            return
        self.solved_classes += len(classes)
        number: dict[LinkClass, int] = {}
        flow: list[int] = []
        link: list[int] = []
        uses: list[float] = []
        for i, flow_class in enumerate(classes):
            for links, times in flow_class.uses.items():
                flow.append(i)
                link.append(number.setdefault(links, len(number)))
                uses.append(times)
        if len(classes) == 1:
            rates = [min(links.capacity / times for links, times in classes[0].uses.items())]
        else:
            capacity = np.array([links.capacity for links in number])
            crossings = np.array(flow), np.array(link), np.array(uses)
            rates = max_min_rates(capacity, *crossings, len(classes)).tolist()
        for flow_class, rate in zip(classes, rates, strict=True):
            self._advance(flow_class, now_s)
            flow_class.rate_bytes_per_s = rate
            flow_class.finish_s = now_s + flow_class.left_bytes / rate if rate > 0 else np.inf
            if rate > 0:
                entry = (flow_class.finish_s, next(self._serial), flow_class)
                heappush(self._finishes, entry)

    def _advance(self, flow_class: FlowClass, now_s: float) -> None:
        moved = flow_class.rate_bytes_per_s * (now_s - flow_class.since_s)
        flow_class.moved_bytes += moved
        flow_class.left_bytes = max(flow_class.left_bytes - moved, 0.0)
        flow_class.since_s = now_s

    def _add(self, flow_class: FlowClass) -> None:
        self._classes[flow_class] = None
        for links, times in flow_class.uses.items():
            links.crossed_by[flow_class] = times

    def _remove(self, flow_class: FlowClass) -> None:
        del self._classes[flow_class]
        for links, times in flow_class.uses.items():
            self._carried[links.links] += times * flow_class.moved_bytes
            del links.crossed_by[flow_class]
            if not links.crossed_by:
                for link in _numbers(links.links):
                    self._of_link[link] = None


def joined(parts: list[Flows]) -> Flows:
    """Flows one behind the other, their paths as wide as the widest."""
    if not parts:
        return Flows(np.empty((0, 0), np.intp), np.empty(0), np.empty(0, np.intp))
    width = max(part.paths.shape[1] for part in parts)
    paths = np.concatenate([widened(part.paths, width) for part in parts])
    sizes = np.concatenate([part.sizes for part in parts])
    return Flows(paths, sizes, np.concatenate([part.owners for part in parts]))


def _crossed(flows: Flows) -> list[int]:
    """The links of all flows, as often as they are crossed."""
    return _numbers(flows.paths[flows.paths != NO_LINK])


def _numbers(links: IntArray) -> list[int]:
    numbers: list[int] = links.tolist()
    return numbers


def _members(numbers: IntArray) -> list[IntArray]:
    """Indices of every class, in the order of the numbers of the classes."""
    order = np.argsort(numbers, kind="stable")
    ends = np.cumsum(np.bincount(numbers))[:-1]
    return [part.astype(np.intp) for part in np.split(order, ends)]
