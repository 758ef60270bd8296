"""Tasks of a Ray cluster: a local one, or one that is running.

Ray's own API, because `hydra-ray-launcher` waits for the points in order and gives up all that are
left when one fails, composes every point before the first one starts, and brings a cloud client and
Ray's dashboard with it.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from scenarios.launchers.base import Launcher, Run
from scenarios.point import Job, Outcome, crashed, do_elsewhere
from scenarios.points import Point

QUIET = {
    "include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR",
    "object_store_memory": 80 * 2**20,
}  # fmt: skip
"""A local cluster without what a sweep has no use for; rows go through files, not through Ray."""


@dataclass(kw_only=True)
class RayTasks(Launcher):
    """`hydra/launcher=ray`."""

    address: str | None = None
    """Of a running cluster, whose nodes share this file system; null: a local one."""
    num_cpus: int | None = None
    """Processors of the local cluster; null: all."""
    init: dict[str, Any] = field(default_factory=dict[str, Any])
    """Further arguments of `ray.init`, such as runtime_env."""
    remote: dict[str, Any] = field(default_factory=dict[str, Any])
    """What a point needs, as `ray.remote` names it; num_cpus=1 unless given."""

    def __post_init__(self) -> None:
        if self.num_cpus is not None and self.num_cpus < 1:
            raise ValueError(f"hydra.launcher.num_cpus={self.num_cpus} must be at least 1, or null")
        if self.address is not None and self.num_cpus is not None:
            raise ValueError(
                f"hydra.launcher.num_cpus={self.num_cpus} has no effect on the running cluster "
                f"{self.address}; leave one of them out"
            )

    @contextmanager
    def start(self, job: Job) -> Iterator[Run]:
        """Start or join a cluster, and leave it at the end."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        here = {"address": "local", "num_cpus": self.num_cpus, **QUIET}
        there = {"address": self.address, "log_to_driver": False, "logging_level": "ERROR"}
        _join({**(there if self.address else here), **self.init})
        # Without retries: Ray would do the point of a worker that died again, and so would a
        # point that is too large for the machine kill one worker after another.
        task = ray.remote(**{"num_cpus": 1, "max_retries": 0, **self.remote})(do_elsewhere)
        shared = ray.put(job)
        try:
            yield lambda points: _run(job, points, lambda point: task.remote(shared, point))
        finally:
            ray.shutdown()


def _join(settings: dict[str, Any]) -> None:
    """`ray.init`, up to three times: Ray gives a local cluster 30 s to start, whatever the load."""
    import ray

    for left in (2, 1, 0):
        try:
            ray.init(**settings)
            return
        except Exception as error:
            ray.shutdown()
            if not left or "timed out during startup" not in str(error):
                raise


def _run(job: Job, points: Sequence[Point], submit: Any) -> Iterator[Outcome]:
    import ray
    from ray.exceptions import RayError

    running = {submit(point): point for point in points}
    while running:
        ended, _ = ray.wait(list(running), num_returns=1)
        for reference in ended:
            point = running.pop(reference)
            try:
                outcome = ray.get(reference)
            except RayError as error:
                cause = f"{type(error).__name__}: {str(error).splitlines()[0].strip()}"
                outcome = crashed(job, point, f"the worker of this point died ({cause})")
            yield outcome
