"""Jobs of a Slurm cluster, or of this machine in the same way, by submitit.

Settings are those of `hydra-submitit-launcher`. Its own launcher waits for the jobs in order and
gives up all that are left when one fails.
"""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from hydra_plugins.hydra_submitit_launcher.config import (
    BaseQueueConf,
    LocalQueueConf,
    SlurmQueueConf,
)

from scenarios.launchers.base import Launcher, Run
from scenarios.point import Job, Outcome, crashed, do_elsewhere
from scenarios.points import Point
from sim.files import BUILDING

FOLDER = f"{BUILDING}submitit"
"""Inside the folder of the sweep, which all nodes see: what submitit writes while it runs."""
HYDRAS = {"_target_", "submitit_folder"}
"""Fields of the settings that are Hydra's, not submitit's."""


class _Jobs(Launcher):
    """What Slurm and this machine have in common: one job a point."""

    cluster: ClassVar[str]
    """As submitit names it."""
    most_at_once: ClassVar[int | None]
    """So many jobs are submitted at once; None: all."""
    poll_s: ClassVar[float]
    """Seconds between two looks at the jobs."""

    @contextmanager
    def start(self, job: Job) -> Iterator[Run]:
        """Make the executor; jobs that are left at the end are cancelled."""
        executor = self.executor(Path(job.root) / FOLDER)
        open_jobs: dict[Any, Point] = {}
        try:
            yield lambda points: self._run(executor, job, points, open_jobs)
        finally:
            for one in open_jobs:
                one.cancel(check=False)
            shutil.rmtree(Path(job.root) / FOLDER, ignore_errors=True)

    def executor(self, folder: Path) -> Any:
        """Submitit's executor with these settings.

        Args:
            folder: for scripts, logs and returned values.

        Raises:
            ValueError: there is no such cluster here, or it refuses a setting.
        """
        import submitit

        shared = {field.name for field in fields(BaseQueueConf)}
        settings = {
            key if key in shared else f"{self.cluster}_{key}": value
            for key, value in asdict(self).items()
            if key not in HYDRAS and value not in (None, {})
        }
        at_start = {key: settings.pop(key) for key in ("slurm_max_num_timeout",) if key in settings}
        try:
            executor = submitit.AutoExecutor(folder / "%j", cluster=self.cluster, **at_start)
            executor.update_parameters(**settings)
        except (RuntimeError, NameError, AssertionError) as error:
            raise ValueError(
                f"hydra/launcher=submitit_{self.cluster} cannot start: {error}; submit from a node "
                "of the cluster, or take hydra/launcher=joblib"
            ) from error
        return executor

    def _run(
        self, executor: Any, job: Job, points: Sequence[Point], open_jobs: dict[Any, Point]
    ) -> Iterator[Outcome]:
        most = self.most_at_once or len(points)
        left = list(points)
        while left or open_jobs:
            free = most - len(open_jobs)
            batch, left = left[:free], left[free:]
            if batch:
                submitted = executor.map_array(do_elsewhere, [job] * len(batch), batch)
                open_jobs.update(zip(submitted, batch, strict=True))
            ended = [one for one in open_jobs if one.done()]
            for one in ended:
                yield _outcome(one, job, open_jobs.pop(one))
            if not ended:
                time.sleep(self.poll_s)


def _outcome(one: Any, job: Job, point: Point) -> Outcome:
    """What a job says at its end, or what its end says."""
    try:
        return one.results()[0]
    except Exception as error:  # submitit's own kinds share no base, and logs may be gone
        said = [line for line in str(error).splitlines() if line.strip()]
        why = f"state {one.state}, {said[0].strip()}" if said else f"state {one.state}"
        return crashed(job, point, f"the job of this point ended without a result ({why})")


@dataclass(kw_only=True)
class SubmititSlurm(SlurmQueueConf, _Jobs):
    """`hydra/launcher=submitit_slurm`: a job array, one job a point."""

    cluster = "slurm"
    most_at_once = None
    poll_s = 5.0


@dataclass(kw_only=True)
class SubmititLocal(LocalQueueConf, _Jobs):
    """`hydra/launcher=submitit_local`: the same on this machine, a process a point."""

    cluster = "local"
    most_at_once = os.cpu_count() or 1
    poll_s = 0.1
