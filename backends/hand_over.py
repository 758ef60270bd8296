"""Prefill and decode on separate instances for real, each a process of its own.

The twin of `sim/processes/hand_over.py`. Requests, first tokens and answers go through the router;
KV blocks go from instance to instance over `backends/collectives.py`.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist

from backends.collectives import Collectives, Tally
from backends.emulated_link import EmulatedLink
from backends.heartbeat import TCPStore
from backends.inbox import Inbox
from backends.instance_timing import InstanceTiming
from backends.instances import DecodeSide, PrefillSide
from backends.kv_link import Receiver, Sender
from backends.processes import process_context
from backends.ranks import join, require_ranks
from backends.replica import Replica
from backends.replica_processes import Processes, ReplicaSpec, Report
from backends.router import Finished, RoutedRun, Router, finished, together
from backends.sampling import Sampler
from backends.serving import fresh_replica, open_model, warm_up, without_collections
from backends.transformer import Transformer
from sim.engine import ReplicaLimits
from sim.policies.batching.base import Batching
from sim.policies.instance_plan.base import InstancePlan, checked_hand_over, kv_tokens, phases
from sim.policies.routing.base import Routing
from sim.recorder import Choice, RouteRecorder
from sim.requests import Request
from sim.state.router_state import RouterState
from sim.workload.source import Source


@dataclass(frozen=True, kw_only=True)
class InstanceSpec(ReplicaSpec):
    """What an instance process is made of, besides what a replica is."""

    plan: InstancePlan
    num_instances: int
    prompts: Sequence[list[int]] | None = None
    """Token ids by request; None draws them from the seed."""
    sampler: Sampler | None = None
    """None is greedy."""
    link: EmulatedLink | None = None
    """What KV is delayed by; None: nothing."""


class HandOvers:
    """Decides who decodes what was prefilled, and tells them."""

    def __init__(
        self,
        plan: InstancePlan,
        processes: Processes,
        numbers: Sequence[int],
        limits: ReplicaLimits,
    ) -> None:
        self.plan, self.processes, self.numbers = plan, processes, numbers
        self.state = RouterState(len(numbers), limits.num_blocks * limits.block_size)
        self._memory = plan.init()

    def prefilled(
        self, request: Request, report: Report, recorder: RouteRecorder, now_s: float
    ) -> None:
        """A request has its first token on an instance that does not decode."""
        assert report.tokens is not None
        view = request.view(len(report.tokens))
        place = checked_hand_over(self.plan, self._memory, view, self.state, now_s)
        choice = Choice.of(place, self.state, self.numbers)
        source = report.replica
        # The instances say at their end when they saw what follows.
        recorder.hand_over(request.request_id, now_s, choice, now_s, source, kv_tokens(view))
        self.state.sent(view, place)
        content = (request, source, report.tokens)
        self.processes.send(self.numbers[place], "hand_over", content)


class Instances:
    """Instance processes that are loaded and warm, for any number of runs one after another."""

    def __init__(self, spec: InstanceSpec) -> None:
        """Start them.

        Raises:
            ValueError: fewer GPUs than instances, or a plan that cannot group them.
        """
        require_ranks(spec.num_instances, spec.device)
        self.spec = spec
        self.first, self.second = phases(spec.plan, spec.num_instances)
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        pipes = _pipes(self.first, self.second)
        work = _Work(self._store.port, pipes)
        self.processes = Processes(spec, spec.num_instances, work)
        for ends in pipes.values():
            for pipe in ends.values():
                pipe.close()  # the processes have theirs

    def __enter__(self) -> Self:
        self.processes.__enter__()
        self.processes.await_ready()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """End them."""
        if kind is None:
            self.ask("stop")
        self.processes.__exit__(kind, *rest)

    def serve(
        self, source: Source, routing: Routing, batching: Batching | None = None
    ) -> RoutedRun:
        """Serve a source at its arrival times; t = 0 is after all are warm.

        Args:
            source: requests; their arrival times are kept.
            routing: chooses who prefills a request.
            batching: from now on; None: as before.

        Raises:
            ValueError: a policy breaks its rules.
            RuntimeError: an instance died or was silent; its number is named.
        """
        spec = self.spec
        if batching is not None:
            self.ask("batching", batching)
        hand_overs = HandOvers(spec.plan, self.processes, self.second, spec.limits)
        router = Router(self.processes, routing, spec.limits, self.first, hand_overs)
        router.run(source)
        done: list[Finished] = [
            self.processes.result(number) for number in range(spec.num_instances)
        ]
        return together(done, router.recorder)

    def ask(self, command: str, content: Any = None) -> list[Any]:
        """What every instance answers to a command, all at once."""
        self.processes.send_all(command, content)
        return [self.processes.result(number) for number in range(self.spec.num_instances)]

    def tell(self, number: int, command: str, content: Any) -> Any:
        """What one instance answers to a command."""
        self.processes.send(number, command, content)
        return self.processes.result(number)


def serve_handed_over(spec: InstanceSpec, source: Source, routing: Routing) -> RoutedRun:
    """Serve a source on fresh instances; see `Instances.serve`."""
    with Instances(spec) as instances:
        return instances.serve(source, routing)


Ends = dict[int, Connection]
"""Ends of the pipes of one instance, by the instance at the other end."""


def _pipes(first: Sequence[int], second: Sequence[int]) -> dict[int, Ends]:
    """One pipe a pair of an instance that prefills and one that decodes."""
    ends: dict[int, Ends] = {number: {} for number in (*first, *second)}
    for one in first:
        for other in second:
            ends[one][other], ends[other][one] = process_context().Pipe()
    return ends


class _Work(NamedTuple):
    """What an instance process does; made in the parent, called in the child."""

    port: int
    pipes: dict[int, Ends]

    def __call__(self, inbox: Inbox, number: int, spec: ReplicaSpec) -> None:
        """Load, join the others, and serve until told to stop."""
        assert isinstance(spec, InstanceSpec)
        store = TCPStore("127.0.0.1", self.port, is_master=False)
        join(number, spec.num_instances, store, spec.device)
        instance = _Instance(number, spec, self.pipes[number], inbox)
        while (start := inbox.begin(instance.commands)) is not None:
            inbox.send("result", instance.serve(start))
        instance.stop()


class _Instance:
    """One instance in its process."""

    def __init__(self, number: int, spec: InstanceSpec, pipes: Ends, inbox: Inbox) -> None:
        self._number, self._spec, self._inbox = number, spec, inbox
        place = torch.device(spec.device, number) if spec.device == "cuda" else "cpu"
        self._model: Transformer = open_model(spec.weights, str(place))[1]
        self._tally = Tally(number)
        group = Collectives(range(spec.num_instances), self._tally, place, spec.link)
        first, _ = phases(spec.plan, spec.num_instances)
        self._prefills = number in first
        self._limits = spec.limits
        if not self._prefills:
            self._limits = spec.limits._replace(prefix_caching=False)
        warm_up(self._model, self._limits)
        near, far = multiprocessing.Pipe()
        inbox.listen(near)
        device = torch.device(place)
        self._mover: Sender | Receiver
        if self._prefills:
            self._mover = Sender(group, device, pipes, lambda one: far.send(("released", one)))
        else:
            self._mover = Receiver(group, device, pipes, lambda one: far.send(("arrived", one)))
        timing = InstanceTiming(self._model, spec.limits.block_size, self._mover, near.recv)
        self._batching = spec.batching
        self.commands: Mapping[str, Callable[[Any], Any]] = {
            "batching": self._use, **timing.commands,
        }  # fmt: skip

    def _use(self, batching: Batching) -> None:
        self._batching = batching

    def serve(self, start: float) -> Finished:
        """One run."""
        spec, inbox = self._spec, self._inbox
        self._tally.clear()
        if isinstance(self._mover, Sender):
            side = PrefillSide(inbox, self._mover, spec.plan)
        else:
            side = DecodeSide(inbox, self._mover, spec.plan)
        replica = self._replica(side)
        with without_collections():
            trace = replica.run(inbox, start)
        return finished(replica, trace, inbox.delivered_s, side.moves, self._tally.sent())

    def _replica(self, side: PrefillSide | DecodeSide) -> Replica:
        spec = self._spec

        def prompt(request: Request) -> list[int]:
            assert spec.prompts is not None
            return spec.prompts[request.request_id]

        return fresh_replica(
            self._model, self._batching, self._limits, seed=spec.seed,
            prompts=None if spec.prompts is None else prompt, sampler=spec.sampler,
            corruption=spec.corruption if self._number == spec.num_instances - 1 else None,
            number=self._number, exchange=side,
        )  # fmt: skip

    def stop(self) -> None:
        """Leave together: nobody's sockets close while another still talks."""
        if isinstance(self._mover, Receiver):
            self._mover.stop()
        self._inbox.end()
        self._inbox.send("result")
        self._inbox.await_close()
        dist.destroy_process_group()
