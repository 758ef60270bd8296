"""All timed runs of elastic instances, then one load on both panels, each in its own time."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from rich.progress import Progress

from backends.elastic_serving import serve_elastic
from backends.weights import random_model
from hardware_models.scaling import ScalingBase
from scenarios.validation.elastic_time import (
    CONFIG,
    LIMITS,
    Repeat,
    run_of,
    time_lines,
    time_once,
)
from scenarios.validation.elastic_traffic import FLOAT32_BYTES
from scenarios.validation.verdict import Line
from sim.costs.elastic import Scaled
from sim.models.parameters import kv_bytes_per_token
from sim.policies.instance_plan.elastic_sp import ElasticSp
from sim.processes.elastic_instances import Deployment, simulate_elastic
from sim.processes.elastic_pace import CostedGroups
from sim.processes.kv_moves import InstantTransport
from sim.trace import Trace
from sim.workload.recorded import Recorded
from sim.workload.source import Source

SHOWN, SHOWN_SLOTS = 16, 1000
"""Requests of the picture, and slots so few that the longest prompts need both instances."""


class InstanceRuns(NamedTuple):
    """What the picture shows: the same requests on both panels."""

    simulated: Trace
    measured: Trace
    title: str


def timed(
    repeats: int, accept: dict[str, float], seed: int, progress: Progress
) -> tuple[InstanceRuns, list[Line]]:
    """Time everything so many times, and judge it."""
    task = progress.add_task("time", total=repeats + 1)
    found: list[Repeat] = []
    for at in range(repeats):
        found.append(time_once(seed + at))
        progress.advance(task)
    picture = both_panels(found[-1].base, seed)
    progress.advance(task)
    return picture, time_lines(found, accept, seed)


def both_panels(base: ScalingBase, seed: int) -> InstanceRuns:
    """The same requests on both panels, each in its own time."""
    stream = np.random.default_rng(seed)
    span_s = SHOWN * base.prefill_s(1, 512, 512**2)
    load = Recorded(
        arrival_s=np.sort(stream.uniform(0, span_s, SHOWN)).tolist(),
        prompt_tokens=stream.choice((64, 256, 512, 1024), SHOWN).tolist(),
        output_tokens=stream.integers(8, 48, SHOWN).tolist(), max_output_tokens=48,
    )  # fmt: skip
    round_s = base.decode.base_s + base.decode.exchange_s
    plan = ElasticSp(
        attempt_every=4, compute_bound_requests=3, decode_round_s=round_s,
        max_prefill_s=base.prefill_s(1, 1024, 1024**2), prior_output_tokens=20.0,
    )  # fmt: skip
    limits = LIMITS._replace(num_blocks=SHOWN_SLOTS)
    run = replace(run_of(plan, load, base, seed), limits=limits)
    served = serve_elastic(run)
    token_bytes = kv_bytes_per_token(random_model(CONFIG).config, FLOAT32_BYTES)
    deployment = Deployment(plan, limits, run.num_instances, base, token_bytes)
    trace, tables = simulate_elastic(
        Source(load, seed, run.num_instances * SHOWN_SLOTS), deployment, CostedGroups(Scaled(base)),
        InstantTransport,
    )  # fmt: skip
    return InstanceRuns(
        replace(trace, **vars(tables)), replace(served.trace, **vars(served.tables)),
        f"elastic_sp on {run.num_instances} instances, simulated from groups timed one at a time",
    )  # fmt: skip
