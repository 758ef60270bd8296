"""Who sends how fast over which links, by classes of flows that fare alike.

Flows that links connect, directly or over other flows, are a component. A change (flows begin,
finish or are dropped, a capacity changes) computes rates again for the components that it touches
and for no others. Classes are found when flows begin; they stay valid when a whole class
finishes, and are found again only where a change tells members apart.
"""

from collections.abc import Iterable, Mapping
from heapq import heappop, heappush
from itertools import count

import numpy as np

from sim.state.flow_component import (
    Component,
    Flows,
    Mask,
    each_by_itself,
    joined,
    merged,
    of_flows,
)
from sim.state.links import NO_LINK, FloatArray

FEW = 8
"""So many flows that begin at once are not searched for classes, if no class is to be split."""
IDLE = -1
"""Instead of the number of its component, where a link is crossed by no flow."""


class SharedLinks:
    """Max-min fair sharing of links among flows that come and go."""

    def __init__(self, capacity_bytes_per_s: FloatArray) -> None:
        self.capacity = capacity_bytes_per_s.astype(np.float64)
        self.solved_classes = 0
        """Classes of flows whose rate was computed so far: the work done."""
        self._carried = np.zeros(len(self.capacity))
        self._components: dict[int, Component] = {}
        self._component_of = np.full(len(self.capacity), IDLE, np.intp)
        self._finishes: list[tuple[float, int]] = []
        self._numbers = count()

    @property
    def num_classes(self) -> int:
        """Classes of flows under way."""
        return sum(len(component.flows) for component in self._components.values())

    def next_finish_s(self) -> float:
        """When the next class of flows is done; infinity if none will be."""
        while self._finishes and self._finishes[0][1] not in self._components:
            heappop(self._finishes)
        return self._finishes[0][0] if self._finishes else np.inf

    def carried_bytes(self, now_s: float) -> FloatArray:
        """Bytes that each link has carried up to now."""
        total = self._carried.copy()
        for one in self._components.values():
            since = one.part(np.ones(len(one.flows), np.bool_))
            since.advance(now_s)
            total[since.members] += since.carried()
        return total

    def change(
        self,
        now_s: float,
        begin: Flows | None = None,
        capacities: Mapping[int, float] | None = None,
        drop: Iterable[int] = (),
    ) -> list[Flows]:
        """Bring all that a change touches up to now and return the flows that are done.

        Args:
            now_s: not before the last change and not after `next_finish_s()`.
            begin: flows that begin; each crosses at least one link and has bytes to send.
            capacities: new capacity of links, by number, zero or more.
            drop: transfers whose flows end here, undone.
        """
        capacities, dropped = capacities or {}, set(drop)
        crossed: list[int] = []
        if begin is not None:
            crossed = np.unique(begin.paths[begin.paths != NO_LINK]).tolist()
        touched = self._touched(now_s, [*crossed, *capacities], dropped)
        done, rest = self._taken(now_s, touched)
        for link, capacity in capacities.items():
            self.capacity[link] = capacity
        parts = [self._parts(one, capacities, dropped) for one in rest]
        parted = [one for one, parts_it in zip(rest, parts, strict=True) if parts_it]
        rest = [one for one, parts_it in zip(rest, parts, strict=True) if not parts_it]
        if begin is not None:
            meets = [bool(np.isin(one.members, crossed).any()) for one in rest]
            near = [one for one, met in zip(rest, meets, strict=True) if met]
            far = [one for one, met in zip(rest, meets, strict=True) if not met]
            if parted or not self._few(begin, near):
                parted, rest = [*parted, *near], far
            else:
                alone = each_by_itself(now_s, begin, self.capacity)
                rest, begin = [*far, merged([*near, alone])], None
        if parted or begin is not None:
            rest += self._rebuilt(now_s, parted, begin, dropped)
        for component in rest:
            for one in component.connected():
                self._put(one)
        return done

    def _touched(self, now_s: float, links: list[int], dropped: set[int]) -> dict[int, None]:
        """Components in which something is done, on whose links something changes, or dropped."""
        numbers: dict[int, None] = {}
        while self.next_finish_s() <= now_s:
            numbers[heappop(self._finishes)[1]] = None
        held: list[int] = np.unique(self._component_of[np.array(links, np.intp)]).tolist()
        numbers.update((number, None) for number in held if number != IDLE)
        for number, component in self._components.items() if dropped else ():
            if any(dropped.intersection(flows.owners.tolist()) for flows in component.flows):
                numbers[number] = None
        return numbers

    def _parts(
        self, component: Component, capacities: Mapping[int, float], dropped: set[int]
    ) -> bool:
        """Whether a change tells members of a class apart; else capacities are set at once."""
        if dropped:
            return True
        for link in capacities:
            found = component.member_class[component.members == link]
            if len(found):
                if (component.member_class == found[0]).sum() > 1:
                    return True
                component.capacity[found[0]] = self.capacity[link]
        return False

    def _few(self, begin: Flows, near: list[Component]) -> bool:
        """Whether flows can be classes of their own without parting any class of links."""
        if len(begin.sizes) > FEW:
            return False
        crossed = begin.crossed()
        for component in near:
            sizes = np.bincount(component.member_class)
            if (sizes[component.member_class[np.isin(component.members, crossed)]] > 1).any():
                return False
        return True

    def _rebuilt(
        self, now_s: float, parted: list[Component], begin: Flows | None, dropped: set[int]
    ) -> list[Component]:
        """The flows of some components, and those that begin, in classes found anew."""
        parts = [] if begin is None else [begin]
        for component in parted:
            self._without(component, np.ones(len(component.flows), np.bool_))
            for flows in component.remaining():
                stays = [owner not in dropped for owner in flows.owners.tolist()]
                parts.append(flows if all(stays) else flows.of(np.array(stays)))
        if not any(len(part.sizes) for part in parts):
            return []
        return [of_flows(now_s, joined(parts), self.capacity)]

    def _taken(self, now_s: float, numbers: Iterable[int]) -> tuple[list[Flows], list[Component]]:
        """Components up to now, out of the books; first the flows that are done."""
        done: list[Flows] = []
        rest: list[Component] = []
        for number in numbers:
            component = self._components.pop(number)
            component.advance(now_s)
            ends = component.finish_s <= now_s
            done += [f for f, end in zip(component.flows, ends.tolist(), strict=True) if end]
            left = self._without(component, ends) if ends.any() else component
            if left.flows:
                rest.append(left)
        return done, rest

    def _without(self, component: Component, ends: Mask) -> Component:
        """A component without some classes of flows; what they carried is counted."""
        gone = component.part(ends)
        self._carried[gone.members] += gone.carried()
        self._component_of[component.members] = IDLE
        return component.part(~ends)

    def _put(self, component: Component) -> None:
        """Solve a component and keep it."""
        component.solve()
        self.solved_classes += len(component.flows)
        number = next(self._numbers)
        self._components[number] = component
        self._component_of[component.members] = number
        finish_s = float(component.finish_s.min())
        if finish_s < np.inf:
            heappush(self._finishes, (finish_s, number))
