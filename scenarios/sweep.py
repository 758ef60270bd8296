"""`diptych run -m`: every point of a sweep, wherever a launcher runs it, and one table of all.

Each point writes its row by itself and atomically, so that a crash loses that point only. The table
is made of the rows, sorted by configuration: its bytes do not depend on launcher or workers.
"""

import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf

from scenarios import points, rows, sweep_folder, sweep_table, tables
from scenarios.compose import Command, compose_config
from scenarios.explain import explain
from scenarios.folders import user_folders
from scenarios.launchers.base import Launcher, Run
from scenarios.launchers.choose import launcher
from scenarios.point import Job, remember
from scenarios.points import Composer, discrete_values
from scenarios.progress import Telling
from scenarios.saving import digest
from scenarios.search_space import Interval, Space


@dataclass(frozen=True)
class Plan:
    """A sweep that has been checked and not begun."""

    job: Job
    launcher: Launcher
    space: Space
    """What its points choose from."""

    @property
    def root(self) -> Path:
        """Folder of the sweep."""
        return Path(self.job.root)


def sweep(command: Command) -> int:
    """Run all points; 0 if every one succeeded, else 1, or 130 after Ctrl-C.

    Raises:
        ValueError: the study or its sweep cannot be composed, and what was there stays; or the
            sweep broke off.
    """
    config = base(command)
    if config.hydra.runtime.choices["hydra/sweeper"] != "basic":
        raise ValueError(
            f"hydra/sweeper={config.hydra.runtime.choices['hydra/sweeper']} has no place here; a "
            "sweep tries every combination, and `diptych search` looks for the best"
        )
    plan = settle(command, config, config.hydra.sweeper.params or {}, discrete_values)
    todo = plan.space.every()

    def run_all(run: Run) -> None:
        with Telling(plan.job.study, len(todo)) as telling:
            for outcome in run(todo):
                telling.tell(outcome)

    return go(plan, run_all) or _finish(plan.root)


def base(command: Command) -> DictConfig:
    """The configuration that all points share, with Hydra's part.

    Raises:
        ValueError: it cannot be composed.
    """
    assert command.study is not None
    try:
        parsed = OverridesParser.create().parse_overrides(command.overrides)
    except OverrideParseException as error:
        raise ValueError(explain(error)) from error
    shared = [str(one.input_line) for one in parsed if not one.is_sweep_override()]
    return compose_config(command.study, shared, command.config_dir, with_hydra=True)


def settle(
    command: Command,
    config: DictConfig,
    params: Mapping[str, Any],
    read: Callable[[Override], list[str] | Interval],
) -> Plan:
    """Check everything that can be checked before a point runs.

    Every value is composed once, so that what no point can be is refused here.

    Args:
        command: as it was typed.
        config: its `base`.
        params: values of keys beside those of the command line, in Hydra's words.
        read: what an override lets a point choose.

    Raises:
        ValueError: a value, launcher or folder that is refused.
    """
    assert command.study is not None
    folders = user_folders(command.config_dir)
    chosen = launcher(config)
    composer = Composer(command.study, folders)
    axes = {key: read(one) for key, one in composer.chosen(command.overrides, params).items()}
    space = Space(axes)
    named = digest([sorted(space.ends().items()), configuration_text(config)])
    out = Path(config.out or Path("runs") / command.study / f"sweep-{named}")
    root = sweep_folder.claim(out)
    for point in points.each_value_once(space.ends()):
        composer.compose(point)
    job = Job(
        study=command.study,
        folders=tuple(str(folder) for folder in folders),
        root=str(root),
        place=str(Path.cwd()),
        resume=bool(config.resume),
    )
    remember(job, composer)
    return Plan(job, chosen, space)


def go(plan: Plan, run_all: Callable[[Run], None]) -> int:
    """Run points in the folder of a sweep; 0, or 130 after Ctrl-C.

    Raises:
        ValueError: the sweep broke off; the message says what is kept and how to go on.
    """
    sweep_folder.put_aside(plan.root, resume=plan.job.resume)
    try:
        with plan.launcher.start(plan.job) as run:
            run_all(run)
    except KeyboardInterrupt:
        sys.stderr.write(f"interrupted: {_broken_off(plan)}\n")
        return 130
    except Exception as error:
        if isinstance(error, ValueError) and not rows.read(plan.root):  # refused at its start
            sweep_folder.restore(plan.root)
            raise
        raise ValueError(f"{_broken_off(plan)} ({type(error).__name__}: {error})") from error
    except BaseException:
        _broken_off(plan)
        raise
    return 0


def keep_nothing(root: Path) -> None:
    """Every point failed: what was there before comes back."""
    shutil.rmtree(root / rows.FOLDER, ignore_errors=True)
    sweep_folder.restore(root)


def _finish(root: Path) -> int:
    """Make the table of all rows and show it."""
    found = rows.read(root)
    failed = [row for row in found if row["error"]]
    if len(failed) == len(found):
        rows.show(found)
        keep_nothing(root)
        return 1
    sweep_table.write(found, root)
    sweep_folder.settle(root, found)
    rows.show(found)
    tables.console().print(f"saved in {root}", soft_wrap=True)
    return 1 if failed else 0


def _broken_off(plan: Plan) -> str:
    """Keep what is done, or else what was there before; what to tell of it."""
    num_finished = len(rows.read(plan.root))
    if not num_finished:
        sweep_folder.restore(plan.root)
        return f"study {plan.job.study}: the sweep broke off before any point was done"
    sweep_folder.keep_for_later(plan.root, resume=plan.job.resume)
    return (
        f"study {plan.job.study}: the sweep broke off after {num_finished} points, which are kept "
        f"in {plan.root}; the same command with resume=true does the rest"
    )


def configuration_text(config: DictConfig) -> str:
    """What the points share, as YAML without Hydra's part."""
    shared = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    shared.out, shared.resume = None, False
    return OmegaConf.to_yaml(shared)
