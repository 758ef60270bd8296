"""Policies that break the rules, for the tests of both panels, which refuse them in one wording."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sim.engine import ReplicaLimits
from sim.policies.batching.base import DECODE, Batch, Batching, ReplicaView, whole_prompts
from sim.workload.recorded import Recorded

LIMITS = ReplicaLimits(2, 64, 4, 4)
LOAD = Recorded(arrival_s=[0.0] * 3, prompt_tokens=[8, 8, 4], output_tokens=[8, 8, 4])


@dataclass(kw_only=True)
class Rogue(Batching):
    """Answers with whatever batch it was given."""

    batch: Callable[[ReplicaView], Batch] = field(default=lambda view: DECODE)

    def next_batch(self, memory: Any, view: ReplicaView) -> Batch:
        del memory
        return self.batch(view)


def first_then(batch: Batch) -> Callable[[ReplicaView], Batch]:
    """Start the head of the queue, then answer with one batch for ever."""

    def answer(view: ReplicaView) -> Batch:
        return batch if view.num_running else whole_prompts(view)

    return answer


def everyone(view: ReplicaView) -> Batch:
    chunks = tuple((request.request_id, request.prefill_tokens) for request in view.waiting)
    return Batch(admit=tuple(request_id for request_id, _ in chunks), prefill=chunks)


BAD = {
    "overbooks blocks": (everyone, "takes more blocks or seats than there are"),
    "overbooks blocks by decoding": (first_then(DECODE), "a decode takes more blocks than"),
    "admits without computing": (lambda view: Batch(admit=(0,)), "computes nothing"),
    "leaves everyone waiting": (lambda view: Batch(), "left 3 requests unserved"),
    "leaves a running request": (first_then(Batch()), "requests unserved"),
    "decodes nobody": (lambda view: DECODE, "left 3 requests unserved"),
    "admits who does not wait": (lambda view: Batch((7,), (), ((7, 1),)), "request 7"),
    "admits someone twice": (lambda view: Batch((0, 0), (), ((0, 1),)), "request 0"),
    "admits a runner": (first_then(Batch((0,), (), ((0, 1),))), "request 0"),
    "pre-empts who does not run": (lambda view: Batch((0,), (1,), ((0, 1),)), "request 1"),
    "prefills a waiting request": (lambda view: Batch((), (), ((2, 1),)), "request 2"),
    "prefills past the prompt": (lambda view: Batch((2,), (), ((2, 5),)), "request 2"),
    "prefills nothing": (lambda view: Batch((0, 1), (), ((0, 0), (1, 1))), "request 0"),
    "prefills twice": (lambda view: Batch((2,), (), ((2, 3), (2, 2))), "two chunks"),
    "prefills two whole chunks": (lambda view: Batch((2,), (), ((2, 2), (2, 2))), "two chunks"),
    "prefills a decoding request": (first_then(Batch((), (), ((0, 1),))), "request 0"),
}
