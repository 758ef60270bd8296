"""Flows that links connect, as arrays: classes of flows, classes of links, and where they cross."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.state.flow_classes import flow_classes
from sim.state.links import NO_LINK, FloatArray, IntArray, widened
from sim.state.max_min import max_min_rates

Mask = NDArray[np.bool_]


class Flows(NamedTuple):
    """Flows that begin at one instant, or that are in one class."""

    paths: IntArray
    """Links of every flow, filled up with -1. Shape: flows, hops."""
    sizes: FloatArray
    """Bytes that each has to send as it begins."""
    owners: IntArray
    """Number of the transfer that each is part of."""

    def of(self, members: IntArray | Mask | slice) -> "Flows":
        """Some of these flows."""
        return Flows(self.paths[members], self.sizes[members], self.owners[members])

    def crossed(self) -> list[int]:
        """The links of all these flows, as often as they are crossed."""
        crossed: list[int] = self.paths[self.paths != NO_LINK].tolist()
        return crossed


def joined(parts: Sequence[Flows]) -> Flows:
    """Flows one behind the other, their paths as wide as the widest."""
    width = max(part.paths.shape[1] for part in parts)
    paths = np.concatenate([widened(part.paths, width) for part in parts])
    sizes = np.concatenate([part.sizes for part in parts])
    return Flows(paths, sizes, np.concatenate([part.owners for part in parts]))


@dataclass(eq=False, slots=True)
class Component:
    """Classes of flows and of links that are connected, brought up to one instant."""

    since_s: float
    flows: list[Flows]
    """Members of every class of flows."""
    left_bytes: FloatArray
    """What a flow of each class still has to send at `since_s`."""
    moved_bytes: FloatArray
    """What it has sent since it is in this class."""
    capacity: FloatArray
    """Bytes/s of a link of each class of links."""
    members: IntArray
    """All links of all classes."""
    member_class: IntArray
    """The class of each of them."""
    flow: IntArray
    """Of every crossing of a class of flows and a class of links: which class of flows."""
    link: IntArray
    """Likewise, which class of links."""
    uses: FloatArray
    """Likewise, how many of these flows cross each of these links."""
    rate: FloatArray
    """Bytes/s of a flow of each class."""
    finish_s: FloatArray
    """When each class of flows is done if nothing changes."""

    def advance(self, now_s: float) -> None:
        """Let bytes flow up to now."""
        moved = self.rate * (now_s - self.since_s)
        self.moved_bytes = self.moved_bytes + moved
        self.left_bytes = np.maximum(self.left_bytes - moved, 0.0)
        self.since_s = now_s

    def solve(self) -> None:
        """Give every class its fair rate."""
        if len(self.flows) == 1:
            self.rate = np.array([(self.capacity[self.link] / self.uses).min()])
        else:
            crossings = (self.flow, self.link, self.uses)
            self.rate = max_min_rates(self.capacity, *crossings, len(self.flows))
        needed_s = np.full(len(self.flows), np.inf)
        np.divide(self.left_bytes, self.rate, out=needed_s, where=self.rate > 0)
        self.finish_s = self.since_s + needed_s

    def part(self, flows: Mask) -> "Component":
        """Some classes of flows, and the classes of links that they cross."""
        crossing = flows[self.flow]
        links = np.zeros(len(self.capacity), np.bool_)
        links[self.link[crossing]] = True
        member = links[self.member_class]
        new_flow, new_link = np.cumsum(flows) - 1, np.cumsum(links) - 1
        return Component(
            self.since_s,
            [one for one, chosen in zip(self.flows, flows.tolist(), strict=True) if chosen],
            self.left_bytes[flows], self.moved_bytes[flows], self.capacity[links],
            self.members[member], new_link[self.member_class[member]],
            new_flow[self.flow[crossing]], new_link[self.link[crossing]], self.uses[crossing],
            self.rate[flows], self.finish_s[flows],
        )  # fmt: skip

    def connected(self) -> Iterator["Component"]:
        """The parts that no link connects any more."""
        label = np.arange(len(self.capacity))
        of_flow = np.full(len(self.flows), len(label))
        while True:
            np.minimum.at(of_flow, self.flow, label[self.link])
            lower = label.copy()
            np.minimum.at(lower, self.link, of_flow[self.flow])
            if np.array_equal(lower, label):
                break
            label = lower
        first = int(of_flow[0])
        if (of_flow == first).all():
            yield self
            return
        for value in np.unique(of_flow):
            yield self.part(of_flow == value)

    def carried(self) -> FloatArray:
        """Bytes that each of `members` has carried of flows in their present classes."""
        moved = self.uses * self.moved_bytes[self.flow]
        by_class: FloatArray = np.bincount(self.link, moved, len(self.capacity)).astype(np.float64)
        return by_class[self.member_class]

    def remaining(self) -> list[Flows]:
        """The flows of every class, with the bytes that they still have to send as their sizes."""
        left = self.left_bytes.tolist()
        return [
            flows._replace(sizes=np.full(len(flows.sizes), size))
            for flows, size in zip(self.flows, left, strict=True)
        ]


def of_flows(now_s: float, flows: Flows, capacity: FloatArray) -> Component:
    """Flows in the coarsest classes in which they fare alike; they need not be connected.

    Args:
        now_s: when they have `flows.sizes` still to send.
        flows: at least one.
        capacity: of every link there is, by number.
    """
    classes = flow_classes(flows.paths, flows.sizes, capacity)
    members = _split(classes.of_flow)
    first = np.array([member[0] for member in members])
    num_links = np.bincount(classes.of_link)
    # A flow of each class shows which classes of links it crosses, and how many links of each.
    class_of = np.zeros(len(capacity), np.intp)
    class_of[classes.links] = classes.of_link
    crossed = flows.paths[first] != NO_LINK
    row = np.nonzero(crossed)[0]
    key = row * len(num_links) + class_of[flows.paths[first][crossed]]
    keys, times = np.unique(key, return_counts=True)
    flow, link = np.divmod(keys, len(num_links))
    sizes = np.array([len(member) for member in members])
    capacity_of = np.empty(len(num_links))
    capacity_of[classes.of_link] = capacity[classes.links]
    return Component(
        now_s, [flows.of(member) for member in members], flows.sizes[first],
        np.zeros(len(first)), capacity_of, classes.links, classes.of_link,
        flow, link, times * sizes[flow] / num_links[link],
        np.zeros(len(first)), np.full(len(first), np.inf),
    )  # fmt: skip


def each_by_itself(now_s: float, flows: Flows, capacity: FloatArray) -> Component:
    """Every flow and every link in a class of its own."""
    links = sorted(set(flows.crossed()))
    members = np.array(links, np.intp)
    of_link = np.zeros(len(capacity), np.intp)
    of_link[members] = np.arange(len(links))
    crossed = flows.paths != NO_LINK
    row = np.nonzero(crossed)[0]
    keys, times = np.unique(row * len(links) + of_link[flows.paths[crossed]], return_counts=True)
    flow, link = np.divmod(keys, len(links))
    count = len(flows.sizes)
    return Component(
        now_s, [flows.of(slice(i, i + 1)) for i in range(count)], flows.sizes.copy(),
        np.zeros(count), capacity[members], members, np.arange(len(links)),
        flow, link, times.astype(np.float64), np.zeros(count), np.full(count, np.inf),
    )  # fmt: skip


def merged(parts: Sequence[Component]) -> Component:
    """Components of one instant as one; links in two of them must be classes of their own there."""
    flows = np.cumsum([0, *(len(part.flows) for part in parts)])
    links = np.cumsum([0, *(len(part.capacity) for part in parts)])

    def all_of(arrays: Sequence[NDArray[np.float64]]) -> FloatArray:
        return np.concatenate(arrays)

    member = np.concatenate([part.members for part in parts])
    member_class = np.concatenate(
        [part.member_class + by for part, by in zip(parts, links[:-1], strict=True)]
    )
    flow = np.concatenate([part.flow + by for part, by in zip(parts, flows[:-1], strict=True)])
    link = np.concatenate([part.link + by for part, by in zip(parts, links[:-1], strict=True)])
    members, first, again = np.unique(member, return_index=True, return_inverse=True)
    # Of a link that is in two parts the first one's class stays; the others' become that one.
    stays: IntArray = np.arange(int(links[-1]))
    stays[member_class] = member_class[first][again]
    kept, renumbered = np.unique(stays, return_inverse=True)
    return Component(
        parts[0].since_s, [one for part in parts for one in part.flows],
        all_of([part.left_bytes for part in parts]), all_of([part.moved_bytes for part in parts]),
        all_of([part.capacity for part in parts])[kept], members, renumbered[member_class[first]],
        flow, renumbered[link], all_of([part.uses for part in parts]),
        all_of([part.rate for part in parts]), all_of([part.finish_s for part in parts]),
    )  # fmt: skip


def _split(numbers: IntArray) -> list[IntArray]:
    """Indices of every class, in the order of the numbers of the classes."""
    order = np.argsort(numbers, kind="stable")
    ends = np.cumsum(np.bincount(numbers))[:-1]
    return [part.astype(np.intp) for part in np.split(order, ends)]
