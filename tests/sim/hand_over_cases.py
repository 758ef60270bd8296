"""Deployments of instances that prefill and instances that decode, small and random."""

from collections.abc import Callable
from typing import Any

from serving_cases import CONTEXT, Case

from sim.policies.batching.base import Batching
from sim.policies.instance_plan.base import InstancePlan
from sim.policies.instance_plan.prefill_decode import PrefillDecode
from sim.policies.routing.base import Routing
from sim.policies.routing.least_loaded import LeastLoaded
from sim.processes.exact_time import ExactEnvironment
from sim.processes.hand_over import simulate_hand_over
from sim.processes.kv_moves import HandOverLog, LinkTransport, Transport
from sim.processes.pace import Costed, Pace
from sim.processes.router import Engines
from sim.trace import Trace
from sim.workload.source import Source

TOKEN_BYTES = 1024


def link(latency_s: float, bytes_per_s: float) -> Callable[[ExactEnvironment], Transport]:
    """One link of this latency and bandwidth into each instance."""
    return lambda environment: LinkTransport(environment, latency_s, bytes_per_s)


COARSE = link(0.5, 32 * TOKEN_BYTES)
"""Takes whole multiples of half a second where blocks are of 16 tokens: ties with iterations."""


def run(
    case: Case, batching: Batching, count: int, *, plan: InstancePlan | None = None,
    routing: Routing | None = None, transport: Callable[[ExactEnvironment], Transport] = COARSE,
    paces: list[Pace] | None = None, log: HandOverLog | None = None, **engines: Any,
) -> Trace:  # fmt: skip
    """Serve a case on so many instances, the first of which prefills."""
    return simulate_hand_over(
        Source(case.workload, 0, CONTEXT), routing or LeastLoaded(), plan or PrefillDecode(),
        Engines(
            batching=batching, limits=case.limits, paces=paces or [Costed(case.cost)] * count,
            **engines,
        ),
        transport, TOKEN_BYTES, log=log,
    )  # fmt: skip
