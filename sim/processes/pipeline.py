"""The stages of a replica under simulated time: each computes one batch at a time, in order.

A replica of several stages has several batches in flight, so that a stage computes one while the
others compute theirs (GPipe's micro-batches, Huang et al. 2019; vLLM's virtual engines).
"""

from collections.abc import Sequence

from sim.costs.base import StagedCost, decode_shape
from sim.models.work import IterationShape
from sim.processes.pace import Jitter


class Pipeline:
    """Stages that the lanes of one replica share, first come first served.

    Batches enter the first stage one after another and keep that order in all others, so that what
    each stage does follows from when it is free.
    """

    def __init__(
        self, cost: StagedCost, layers: Sequence[int], jitter: Jitter | None = None
    ) -> None:
        """Take over what an iteration costs.

        Args:
            cost: of an iteration that passes through all stages alone.
            layers: of each stage.
            jitter: by how much a batch differs from its like, on all stages; None: by nothing.
        """
        self._cost, self._jitter = cost, jitter
        self._shares = [count / sum(layers) for count in layers]
        self.free_s = [0.0] * len(layers)
        """When each stage has computed all that it was given so far."""

    def stage_seconds(self, shape: IterationShape) -> list[float]:
        """Seconds of a batch on each stage: by layers, lm_head and sampling on the last one."""
        total_s = self._cost.iteration_s(shape)
        sampled_s = min(self._cost.sampled_s(shape.sampled_tokens), total_s)
        seconds = [(total_s - sampled_s) * share for share in self._shares]
        seconds[-1] += sampled_s
        return seconds

    def enter(self, now_s: float, shape: IterationShape) -> float:
        """Let a batch pass through the stages; when the last one has computed it.

        It takes longer where it finds another one in them and stages slow each other down.
        """
        ratio = 1.0 if self._jitter is None else self._jitter.ratio(now_s)
        if max(self.free_s) > now_s:
            ratio *= self._cost.slow_down
        at_s = now_s
        for stage, seconds in enumerate(self.stage_seconds(shape)):
            at_s = max(at_s, self.free_s[stage]) + seconds * ratio
            self.free_s[stage] = at_s
        return at_s


class Lane:
    """The `Pace` of one batch in flight. It decides when the first stage can begin its batch."""

    start_s = None
    takes_turns = True

    def __init__(self, pipeline: Pipeline) -> None:
        """Share the stages with the replica's other lanes."""
        self._pipeline = pipeline

    def decides_s(self, now_s: float) -> float:
        """When the first stage is free: a batch that is decided earlier would only wait."""
        return max(now_s, self._pipeline.free_s[0])

    def wakes_s(self, now_s: float) -> float | None:
        """When something comes in."""
        del now_s
        return None

    def iteration(self, now_s: float, shape: IterationShape) -> list[float]:
        """`[now_s, end]` of one iteration."""
        return [now_s, self._pipeline.enter(now_s, shape)]

    def decode_run(
        self, now_s: float, num_decodes: int, decode_context: int, iterations: int
    ) -> list[float]:
        """One iteration: how long the next one takes depends on the other lanes."""
        del iterations
        return self.iteration(now_s, decode_shape(num_decodes, decode_context))


def lanes_of(pipelines: Sequence[Pipeline], lanes: int) -> list[Lane]:
    """The paces of all lanes of several replicas: the first lane of each, the second of each.

    In this order a router that takes the first of equals spreads requests over replicas before it
    makes two batches share the stages of one.

    Args:
        pipelines: one a replica.
        lanes: of each replica.
    """
    return [Lane(pipeline) for _ in range(lanes) for pipeline in pipelines]
