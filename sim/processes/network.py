"""A network under simulated time: transfers share links by max-min fairness.

A fluid model: bytes flow at the rate that `sim/state/shared_links.py` gives, from the instant of
the call; the last one arrives the latency of its path later. No packets, no congestion control, no
loss.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike
from simpy.events import Event

from sim.processes.exact_time import ExactEnvironment
from sim.state.flow_component import Flows, joined
from sim.state.links import FloatArray, IntArray, Links
from sim.state.shared_links import SharedLinks


class Wiring(Protocol):
    """Links and the ways over them; `sim/state/links.py` has that of a node or cluster."""

    @property
    def links(self) -> Links:
        """All directed links."""
        ...

    def path(self, source: str, destination: str) -> IntArray:
        """The links from one device to another."""
        ...

    def gpu_paths(self, sources: ArrayLike, destinations: ArrayLike) -> IntArray:
        """The links from GPU to GPU, by rank; filled up with -1. Shape: pairs, hops."""
        ...


class Transfer(Event):
    """Fires when all its bytes have arrived; carries no value."""

    def __init__(self, environment: ExactEnvironment, number: int, num_bytes: float) -> None:
        super().__init__(environment)
        self.number = number
        self.num_bytes = num_bytes
        """All bytes of all its flows."""
        self.flows_left = 0
        self.arrives_s = environment.now
        """When the last byte so far arrives."""


class Network:
    """Links of a node or cluster, shared by all transfers over them."""

    def __init__(self, environment: ExactEnvironment, wiring: Wiring) -> None:
        self.environment = environment
        self.wiring = wiring
        self.shared = SharedLinks(wiring.links.capacity_bytes_per_s)
        self.delivered_bytes = 0.0
        """Bytes of all transfers that have arrived."""
        self._latency_s = np.append(wiring.links.latency_s, 0.0)  # -1: no link, no latency
        self._transfers: dict[int, Transfer] = {}
        self._count = 0
        self._beginning: list[Flows] = []
        self._capacities: dict[int, float] = {}
        self._dropped: list[int] = []
        self._settling = False
        self._wake_s = np.inf
        self._waker: Event | None = None
        """Fires at `_wake_s`; one that was scheduled before it for later is ignored."""

    def transfer(self, source: str, destination: str, num_bytes: float) -> Transfer:
        """Send bytes from one device to another, as in `network.transfer("gpu0", "gpu1", 1e6)`.

        Raises:
            ValueError: there is no such device, no link leads there, or num_bytes is negative.
        """
        return self.send(self.wiring.path(source, destination)[None, :], num_bytes)

    def transfer_all(
        self, sources: ArrayLike, destinations: ArrayLike, num_bytes: ArrayLike
    ) -> Transfer:
        """Send bytes from GPU to GPU, by rank; done when the last byte of the last pair arrives.

        Args:
            sources: ranks that send. Shape: pairs.
            destinations: ranks that receive. Shape: pairs.
            num_bytes: of every pair, or one number for all.
        """
        return self.send(self.wiring.gpu_paths(sources, destinations), num_bytes)

    def send(self, paths: IntArray, num_bytes: ArrayLike) -> Transfer:
        """Send bytes along given links; done when all have arrived.

        Args:
            paths: links of every flow, by number, filled up with -1. Shape: flows, hops.
            num_bytes: of every flow, or one number for all; zero costs the latency alone.

        Raises:
            ValueError: a number of bytes is negative or not finite.
        """
        sizes = np.broadcast_to(np.asarray(num_bytes, np.float64), len(paths))
        if not (np.isfinite(sizes).all() and (sizes >= 0).all()):
            bad = sizes[~(np.isfinite(sizes) & (sizes >= 0))][0]
            raise ValueError(f"num_bytes={bad} must be zero or more and finite; give bytes")
        transfer = Transfer(self.environment, self._count, float(sizes.sum()))
        self._count += 1
        flowing = (sizes > 0) & (paths >= 0).any(axis=1)
        self._arrive(transfer, paths[~flowing], self.environment.now)
        transfer.flows_left = int(flowing.sum())
        if transfer.flows_left:
            self._transfers[transfer.number] = transfer
            owners = np.full(transfer.flows_left, transfer.number, np.intp)
            self._beginning.append(Flows(paths[flowing], sizes[flowing], owners))
            self._settle_soon()
        else:
            self._deliver(transfer)
        return transfer

    def set_capacity(self, source: str, destination: str, bytes_per_s: float) -> None:
        """Change the capacity of the link between two neighbouring vertices, from now on.

        Zero stops what flows there until the link comes back.

        Raises:
            ValueError: no link joins them, or the capacity is negative or not finite.
        """
        self.set_link_capacity(self.wiring.links.number(source, destination), bytes_per_s)

    def set_link_capacity(self, link: int, bytes_per_s: float) -> None:
        """Change the capacity of a link by its number, from now on."""
        if not (np.isfinite(bytes_per_s) and bytes_per_s >= 0):
            raise ValueError(
                f"bytes_per_s={bytes_per_s} must be zero or more and finite; 0 stops a link"
            )
        self._capacities[link] = bytes_per_s
        self._settle_soon()

    def abort(self, transfer: Transfer) -> None:
        """End a transfer that is under way; it never fires, and frees its links at once.

        Raises:
            ValueError: its bytes have all left already, or it was aborted before.
        """
        if self._transfers.pop(transfer.number, None) is None:
            raise ValueError(f"transfer {transfer.number} is not under way; abort it earlier")
        kept = [flows for flows in self._beginning if flows.owners[0] != transfer.number]
        if len(kept) == len(self._beginning):
            self._dropped.append(transfer.number)
            self._settle_soon()
        self._beginning = kept

    def carried_bytes(self) -> FloatArray:
        """Bytes that each link has carried so far, by number."""
        return self.shared.carried_bytes(self.environment.now)

    def latency_s(self, paths: IntArray) -> FloatArray:
        """Latency along rows of links."""
        return self._latency_s[paths].sum(axis=1)

    def _settle_soon(self) -> None:
        # All that begins at one instant is settled at once: one solution, not one each.
        if not self._settling:
            self._settling = True
            self._call(self.environment.now, self._settle)

    def _wake(self, event: Event) -> None:
        if event is self._waker:
            self._wake_s = np.inf
            self._settle(event)

    def _settle(self, event: Event) -> None:
        del event
        self._settling = False
        now = self.environment.now
        begin = joined(self._beginning) if self._beginning else None
        capacities, dropped = self._capacities, self._dropped
        self._beginning, self._capacities, self._dropped = [], {}, []
        for flows in self.shared.change(now, begin, capacities, dropped):
            self._finished(flows, now)
        wake_s = self.shared.next_finish_s()
        if wake_s < self._wake_s:
            self._wake_s = wake_s
            self._waker = self._call(wake_s, self._wake, early=True)

    def _finished(self, flows: Flows, now: float) -> None:
        owners, first, counts = np.unique(flows.owners, return_index=True, return_counts=True)
        for owner, position, count in zip(
            owners.tolist(), first.tolist(), counts.tolist(), strict=True
        ):
            transfer = self._transfers[owner]
            one = count == 1
            rows = flows.paths[[position]] if one else flows.paths[flows.owners == owner]
            self._arrive(transfer, rows, now)
            transfer.flows_left -= count
            if not transfer.flows_left:
                del self._transfers[owner]
                self._deliver(transfer)

    def _arrive(self, transfer: Transfer, paths: IntArray, sent_s: float) -> None:
        if len(paths):
            latency_s = float(self.latency_s(paths).max())
            transfer.arrives_s = max(transfer.arrives_s, sent_s + latency_s)

    def _deliver(self, transfer: Transfer) -> None:
        # Before the boundaries of that instant, so that what is decided there finds the bytes.
        self._call(transfer.arrives_s, lambda _: self._count_delivered(transfer), early=True)
        self.environment.fire(transfer, transfer.arrives_s)

    def _count_delivered(self, transfer: Transfer) -> None:
        self.delivered_bytes += transfer.num_bytes

    def _call(
        self, instant_s: float, then: Callable[[Event], Any], *, early: bool = False
    ) -> Event:
        environment = self.environment
        event = (environment.arrival if early else environment.boundary)(instant_s)
        event.callbacks = [then]
        return event
