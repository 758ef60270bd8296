"""Attention nodes and expert nodes that serve requests together, under simulated time.

MegaScale-Infer (arXiv 2504.02263), sections 3 and 4.1. Every attention node decides on its own
batch and splits it into micro-batches; all nodes begin an iteration together, as no expert can
compute a micro-batch before it has the tokens of all of them.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, Protocol

from simpy.events import Event

from sim.engine import ReplicaLimits
from sim.expert_rows import NodeBatch, batch_of
from sim.policies.batching.base import Batching
from sim.policies.micro_batching.base import MicroBatching, checked_split
from sim.policies.routing.base import Routing
from sim.processes.exact_time import ExactEnvironment
from sim.processes.feed import Feed
from sim.processes.pace import AtOnce
from sim.processes.replica import Replica
from sim.processes.router import Reports, Router, traces_of
from sim.recorder import RouteRecorder
from sim.requests import Request
from sim.trace import Trace
from sim.trace_merge import merge
from sim.workload.source import Source


class PipelinePace(Protocol):
    """How long iterations of all nodes together last."""

    @property
    def start_s(self) -> float | None:
        """When the first decision is taken; None: when something has come in."""
        ...

    def decides_s(self, now_s: float) -> float:
        """When the next decision is taken, if an iteration has ended at `now_s` or none ran."""
        ...

    def wakes_s(self, now_s: float) -> float | None:
        """When idle nodes decide again; None: as soon as something comes in."""
        ...

    def all_nodes_s(self, now_s: float, batches: Sequence[NodeBatch]) -> float:
        """When an iteration ends that begins now."""
        ...


class PipelineRules(NamedTuple):
    """The decisions of a deployment."""

    batching: Batching
    """Of every attention node."""
    micro_batching: MicroBatching
    routing: Routing
    """Which attention node serves a request."""


class Split(NamedTuple):
    """How every node splits its batch."""

    rule: MicroBatching
    parts: int
    """Micro-batches."""


Watch = Callable[[float, Sequence[NodeBatch]], None]
"""Called with the instant and the batches of all nodes at the start of each iteration."""


class ExpertPipeline:
    """The attention nodes of one deployment; its experts are in how long iterations last."""

    def __init__(
        self, environment: ExactEnvironment, nodes: Sequence[Replica], router: Router,
        split: Split, pace: PipelinePace, watch: Watch | None = None,
    ) -> None:  # fmt: skip
        self.environment = environment
        self._nodes, self._router = nodes, router
        self._split, self._pace, self._watch = split, pace, watch
        self._arrived: list[Request] = []
        self._idle: Event | None = None
        environment.process(self.serve())

    def submit(self, request: Request) -> None:
        """Take a request at its arrival; the next decision sees it."""
        self._arrived.append(request)
        if self._idle is not None:
            self._idle.succeed()
            self._idle = None

    def serve(self) -> Generator[Event, Any, None]:
        """The main loop, from one decision to the next."""
        environment, pace = self.environment, self._pace
        if pace.start_s is not None:
            yield environment.decision(max(pace.start_s, environment.now))
        while True:
            while (instant_s := pace.decides_s(environment.now)) > environment.now:
                yield environment.decision(instant_s)
            for request in self._arrived:
                self._router.submit(request)
            self._arrived = []
            batches = [self._begin(node) for node in self._nodes]
            if not any(batch.rows for batch in batches):
                yield self._sleep()
                continue
            if self._watch is not None:
                self._watch(environment.now, batches)
            yield environment.boundary(pace.all_nodes_s(environment.now, batches))
            for node, batch in zip(self._nodes, batches, strict=True):
                if batch.rows:
                    node.end()

    def _begin(self, node: Replica) -> NodeBatch:
        """A node's batch in parts; without rows where it has nothing to do."""
        batch = node.begin()
        rows = [] if batch is None else batch_of(batch, node.state)
        parts = checked_split(self._split.rule, rows, self._split.parts)
        return NodeBatch(rows, parts)

    def _sleep(self) -> Event:
        instant_s = self._pace.wakes_s(self.environment.now)
        if instant_s is not None:
            return self.environment.decision(instant_s)
        self._idle = Event(self.environment)
        return self._idle


def simulate_expert_pipeline(
    source: Source, rules: PipelineRules, limits: ReplicaLimits, sizes: tuple[int, int],
    pace: PipelinePace, watch: Watch | None = None,
) -> Trace:  # fmt: skip
    """Serve all requests of a source on one deployment.

    Args:
        source: requests in order of arrival.
        rules: decide.
        limits: of every attention node.
        sizes: attention nodes, and micro-batches of an iteration.
        pace: how long iterations last.
        watch: told of every iteration as it begins.

    Raises:
        ValueError: a policy breaks its rules, or leaves requests unserved.
    """
    environment = ExactEnvironment()
    feed = Feed(environment, source)
    recorder = RouteRecorder()
    reports = Reports(recorder)

    def node(number: int) -> Replica:
        def finished(request_id: int, instant_s: float) -> None:
            reports.done(request_id, number, instant_s)
            feed.answered(request_id, instant_s)

        return Replica(
            environment, rules.batching, limits, _UNUSED,
            number=number, finished=finished, driven=True,
        )  # fmt: skip

    nodes = [node(number) for number in range(sizes[0])]
    router = Router(rules.routing, nodes, recorder, reports)
    pipeline = ExpertPipeline(
        environment, nodes, router, Split(rules.micro_batching, sizes[1]), pace, watch
    )
    feed.start(pipeline.submit)
    environment.run()
    unserved = sum(one.state.num_unfinished for one in nodes)
    if unserved:
        raise ValueError(
            f"policy {type(rules.batching).__name__} left {unserved} requests unserved and waits "
            "for arrivals that never come; mend the policy"
        )
    return merge(traces_of(nodes), *recorder.tables())


class _Driven(AtOnce):
    """The pace of a replica that somebody else drives."""

    def iteration(self, now_s: float, shape: object) -> list[float]:
        """Never asked."""
        raise AssertionError(f"a node has no pace of its own: {now_s} s, {shape}")

    def decode_run(
        self, now_s: float, num_decodes: int, decode_context: int, iterations: int
    ) -> list[float]:
        """Never asked."""
        raise AssertionError(f"a node has no pace of its own: {now_s} s, {num_decodes}")


_UNUSED = _Driven()
