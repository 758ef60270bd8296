"""What goes wrong in a run, and when: a GPU, link or node that is slow, or dead for a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from math import inf, isfinite
from typing import NamedTuple


class Part(Enum):
    """What a fault is of."""

    gpu = "gpu"
    """One GPU of a replica: its computing."""
    link = "link"
    """The links between the GPUs of a replica: their collectives."""
    node = "node"
    """The whole machine of a replica: all that it does."""


class Kind(Enum):
    """What is wrong with it."""

    slow = "slow"
    """What it does takes `factor` times as long."""
    dead = "dead"
    """A GPU or node: its replica is gone, with all KV, and comes back empty. A link: what is to
    cross it waits."""


@dataclass(kw_only=True)
class Fault:
    """One fault of one replica. Instants are seconds since the start of the run."""

    part: Part
    """gpu, link or node."""
    kind: Kind
    """slow or dead."""
    replica: int = 0
    """Whose."""
    gpu: int = 0
    """Which of its GPUs, for `part: gpu`: from 0, stage by stage."""
    factor: float | None = None
    """Of `kind: slow`: how many times as long things take, above 1."""
    at_s: float
    """When it begins."""
    until_s: float | None = None
    """When it is over; null: never."""

    def __post_init__(self) -> None:
        self._check_factor()
        if not (isfinite(self.at_s) and self.at_s >= 0):
            raise ValueError(f"at_s={self.at_s} of {self} must be finite and not negative; try 10")
        if self.until_s is not None and not self.at_s < self.until_s < inf:
            raise ValueError(
                f"until_s={self.until_s} of {self} must be after at_s={self.at_s} and finite, or "
                f"null for ever; try {self.at_s + 10}"
            )
        if self.gpu and self.part is not Part.gpu:
            raise ValueError(
                f"gpu={self.gpu} of {self} has no effect; take part=gpu, or leave gpu out"
            )
        if self.part is Part.link and self.kind is Kind.dead and self.until_s is None:
            raise ValueError(
                f"until_s=None of {self}: a link that never comes back stops its replica without "
                "an end; give until_s, or take part=node, whose requests go elsewhere"
            )

    def _check_factor(self) -> None:
        slow = self.kind is Kind.slow
        if slow and not (self.factor is not None and 1 < self.factor < inf):
            raise ValueError(
                f"factor={self.factor} of {self} must be above 1 and finite: how many times as "
                "long things take; try 2"
            )
        if not slow and self.factor is not None:
            raise ValueError(
                f"factor={self.factor} of {self} has no effect on what is dead; leave it out, or "
                "take kind=slow"
            )

    def __str__(self) -> str:
        """How messages name it."""
        return f"fault {self.part.value} {self.kind.value} of replica {self.replica}"

    @property
    def end_s(self) -> float:
        """When it is over; infinite: never."""
        return inf if self.until_s is None else self.until_s

    @property
    def kills(self) -> bool:
        """Whether its replica dies of it: every GPU holds a part of the model."""
        return self.kind is Kind.dead and self.part is not Part.link


class Outage(NamedTuple):
    """A replica is dead from `at_s` and comes back, empty, at `until_s`; infinite: never."""

    replica: int
    at_s: float
    until_s: float


def outages(faults: Sequence[Fault]) -> list[Outage]:
    """The deaths among faults, in order of time."""
    found = [Outage(one.replica, one.at_s, one.end_s) for one in faults if one.kills]
    return sorted(found, key=lambda one: (one.at_s, one.replica))


def check_faults(faults: Sequence[Fault], num_replicas: int, num_gpus: int) -> None:
    """Refuse faults that replicas of so many GPUs cannot have.

    Raises:
        ValueError: there is no such replica, GPU or link; a replica dies while it is dead; or
            nobody is left to serve.
    """
    for one in faults:
        if one.replica not in range(num_replicas):
            raise ValueError(
                f"replica={one.replica} of {one} does not exist: num_replicas={num_replicas} makes "
                f"replicas 0 to {num_replicas - 1}; name one of them, or raise num_replicas"
            )
        if one.gpu not in range(num_gpus):
            raise ValueError(
                f"gpu={one.gpu} of {one} does not exist: tp_size * pp_size={num_gpus} ranks have "
                f"GPUs 0 to {num_gpus - 1}; name one of them"
            )
        if one.part is Part.link and num_gpus == 1:
            raise ValueError(
                f"part=link of {one} has no effect: nothing crosses a link of a replica with "
                "tp_size=1 and pp_size=1; take part=gpu, or more ranks"
            )
    _check_outages(outages(faults), num_replicas)


def _check_outages(found: Sequence[Outage], num_replicas: int) -> None:
    for replica in range(num_replicas):
        mine = [one for one in found if one.replica == replica]
        for one, following in pairwise(mine):
            if following.at_s <= one.until_s:
                raise ValueError(
                    f"at_s={following.at_s}: replica {replica} dies while it is dead from "
                    f"{one.at_s} s until {one.until_s} s; deaths of one replica must not overlap "
                    "or touch: move one, or make them one"
                )
    gone = {one.replica for one in found if one.until_s == inf}
    if len(gone) == num_replicas:
        raise ValueError(
            f"all of num_replicas={num_replicas} are dead for ever, and requests would wait "
            "without end; give one of these faults an until_s"
        )
