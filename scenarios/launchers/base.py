"""What a launcher is: it runs points somewhere, and tells of each as it ends.

Hydra chooses and configures it (`hydra/launcher=NAME`, `hydra.launcher.KEY=VALUE`). Hydra's own
launchers compose each point where the sweep was started and once more where it runs, and lose all
points that are running when one worker dies; ours compose once and lose that point only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what registers launchers is imported by what composes points
    from scenarios.point import Job, Outcome
    from scenarios.points import Point

Run = Callable[["Sequence[Point]"], "Iterator[Outcome]"]
"""Runs points and yields what became of each, in the order in which they end."""


@dataclass(kw_only=True)
class Launcher(ABC):
    """Where the points of a sweep run. Its fields are its settings."""

    @abstractmethod
    def start(self, job: Job) -> AbstractContextManager[Run]:
        """Workers for a sweep, which end with the context; a worker that dies costs its point."""
