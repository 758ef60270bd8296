"""Instance plans that form new groups of instances for every iteration (LoongServe).

Instances hold a full copy of the weights and KV of whole tokens. A plan is asked when a prefill
ends, when a round of decoding ends, when a request arrives and no round is under way, after a step
that pre-empts or migrates and begins nothing, and when an instance is lost. Its answer, a `Step`,
is applied in this order: pre-empt, migrate, and when all that migrates has arrived, begin prefills
and a round. Groups prefill independently of each other; all that decodes does so in rounds: the
groups of a round begin together, and it ends with the last.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

from hardware_models.scaling import ScalingBase
from sim.engine import ReplicaLimits
from sim.policies.instance_plan.base import InstanceGroup, InstancePlan
from sim.requests import RequestView
from sim.steps import DecodeBatch, Ints, Standing, Step


class ElasticView(Protocol):
    """What a deployment shows of itself at a decision. Read only."""

    @property
    def limits(self) -> ReplicaLimits:
        """Of every instance: `num_blocks` slots of one token each; seats and tokens of all."""
        ...

    @property
    def scaling(self) -> ScalingBase:
        """What the plan may know about time."""
        ...

    @property
    def live(self) -> Sequence[int]:
        """Instances that are not lost, in order."""
        ...

    @property
    def free_slots(self) -> Ints:
        """[instances] tokens for whose KV there is room; 0 on one that is lost."""
        ...

    @property
    def prefilling(self) -> frozenset[int]:
        """Instances whose group computes a prefill now: a step leaves them alone."""
        ...

    @property
    def in_round(self) -> bool:
        """Whether a round is under way: a step then leaves batches and their instances alone."""
        ...

    @property
    def batches(self) -> Sequence[DecodeBatch]:
        """All batches that decode or are paused, by number. In a round, as it began."""
        ...

    @property
    def decoding(self) -> frozenset[int]:
        """Instances in groups of the round under way; empty between rounds."""
        ...

    def given_up(self, request_id: int) -> Ints:
        """[instances] slots that come free when this request of a batch is pre-empted."""
        ...

    @property
    def waiting(self) -> Sequence[RequestView]:
        """Requests without KV, pre-empted ones first, then in order of arrival."""
        ...

    @property
    def num_running(self) -> int:
        """Requests that prefill or have KV."""
        ...

    @property
    def rounds(self) -> int:
        """Rounds of decoding that have ended since the start."""
        ...

    @property
    def finished(self) -> tuple[int, int]:
        """Requests that have their last token, and the tokens of their answers in sum."""
        ...


class ElasticPlan(InstancePlan):
    """Forms groups for every iteration."""

    @abstractmethod
    def step(self, memory: Any, view: ElasticView) -> Step:
        """What begins now; an empty step: nothing until the next event.

        Args:
            memory: what `init` made; the only argument that may change.
            view: the deployment now. Not changed.
        """

    def steady(self, memory: Any, view: ElasticView) -> Standing:
        """How long the step just returned stands; asked only where it has a round.

        A plan that says more than one round promises that it would answer the same until then: the
        same groups and masters, and nothing else. The default asks after every round.
        """
        del memory, view
        return Standing()

    def groups(self, memory: Any, num_instances: int) -> tuple[InstanceGroup, ...]:
        """Before the first step: each instance by itself, for both phases."""
        del memory
        return tuple(InstanceGroup((at,), True, True) for at in range(num_instances))
