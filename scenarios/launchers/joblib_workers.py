"""Processes of this machine, by the executor behind joblib.

Each worker is an executor of its own. One executor for all, as in `joblib.Parallel`, ends every
point that is running when one worker dies, and does not tell whose worker it was.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scenarios.launchers.base import Launcher, Run
from scenarios.point import Job, Outcome, crashed, do_elsewhere
from scenarios.points import Point

if TYPE_CHECKING:
    from joblib.externals.loky import ProcessPoolExecutor

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Points share the machine by processes, not by threads too."""


@dataclass(kw_only=True)
class JoblibWorkers(Launcher):
    """`hydra/launcher=joblib`."""

    n_jobs: int = -1
    """Processes; -1: one for each processor."""

    def __post_init__(self) -> None:
        if self.n_jobs != -1 and self.n_jobs < 1:
            raise ValueError(
                f"hydra.launcher.n_jobs={self.n_jobs} must be at least 1, or -1 for as many as "
                "there are processors"
            )

    @contextmanager
    def start(self, job: Job) -> Iterator[Run]:
        """One executor a worker."""
        lanes: list[ProcessPoolExecutor | None] = [None] * (
            (os.cpu_count() or 1) if self.n_jobs == -1 else self.n_jobs
        )
        try:
            yield lambda points: _run(job, points, lanes)
        finally:
            for lane in lanes:
                if lane is not None:
                    lane.shutdown(kill_workers=True)


def _run(
    job: Job, points: Sequence[Point], lanes: list[ProcessPoolExecutor | None]
) -> Iterator[Outcome]:
    left = iter(points)
    running: dict[Future[Outcome], tuple[int, Point]] = {}

    def give(place: int) -> None:
        point = next(left, None)
        if point is not None:
            running[_submit(lanes, place, job, point)] = (place, point)

    for place in range(len(lanes)):
        give(place)
    while running:
        ended, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in ended:
            place, point = running.pop(future)
            try:
                outcome = future.result()
            except BrokenProcessPool as error:
                lanes[place] = None
                outcome = crashed(job, point, f"the worker of this point died ({_why(error)})")
            give(place)
            yield outcome


def _submit(
    lanes: list[ProcessPoolExecutor | None], place: int, job: Job, point: Point
) -> Future[Outcome]:
    """Give a point to a worker, and to a new one where the old has died since its last point."""
    lane = lanes[place]
    if lane is not None:
        try:
            return lane.submit(do_elsewhere, job, point)
        except BrokenProcessPool:
            pass
    from joblib.externals.loky import ProcessPoolExecutor

    lanes[place] = fresh = ProcessPoolExecutor(max_workers=1, env=ONE_THREAD)
    return fresh.submit(do_elsewhere, job, point)


def _why(error: BrokenProcessPool) -> str:
    """The exit code of the worker, such as SIGKILL(-9), from a message of several lines."""
    _, found, codes = str(error).partition("exit codes of the workers are {")
    return codes.partition("}")[0] if found else "without an exit code"
