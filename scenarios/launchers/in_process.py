"""One point after another, in the process of the sweep."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from scenarios.launchers.base import Launcher, Run
from scenarios.point import Job, do


@dataclass(kw_only=True)
class InProcess(Launcher):
    """`hydra/launcher=basic`: nothing to install, nothing runs beside it."""

    @contextmanager
    def start(self, job: Job) -> Iterator[Run]:
        """Nothing to start."""
        yield lambda points: (do(job, point) for point in points)
