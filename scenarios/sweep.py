"""`diptych run -m`: every point of a sweep through Hydra's launchers, and one table of them all.

Each point writes its row by itself and atomically, so that a crash loses that point only. The table
is made of the rows, sorted by configuration: its bytes do not depend on launcher or workers.
"""

import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from scenarios import rows, sweep_folder, tables
from scenarios.compose import DROPS, Command, compose_config, typed
from scenarios.explain import explain
from scenarios.folders import CONF, user_folders
from scenarios.register import SCHEMA, register
from scenarios.saving import digest, identity, save
from scenarios.study import Save
from sim.policies.registry import USER_MODULES

HYDRA_SETTINGS = (
    "hydra/job_logging=disabled",
    "hydra/hydra_logging=disabled",
    "hydra.output_subdir=null",
    "hydra.job.chdir=false",
    "hydra.run.dir=.",
    "hydra.sweep.subdir=.",
)
"""Hydra writes no folders, logs or copies: results are ours, and appear when accepted."""


def sweep(command: Command) -> int:
    """Run all points; 0 if every one succeeded, else 1, or 130 after Ctrl-C.

    Raises:
        ValueError: the study or its sweep cannot be composed, and what was there stays; or the
            sweep broke off.
    """
    assert command.study is not None
    base, root = _settle(command)
    resume = bool(base.resume)
    sweep_folder.put_aside(root, resume=resume)
    overrides = [one for one in command.overrides if not one.startswith(("out=", "resume="))]
    quoted = str(root).replace("'", "\\'")
    overrides += [f"out='{quoted}'", f"resume={str(resume).lower()}"]
    try:
        code = hydra_main(command, ["--multirun", *overrides])
    except BaseException as error:
        text = _broken_off(command.study, root, resume=resume)
        if not isinstance(error, KeyboardInterrupt):
            raise
        sys.stderr.write(f"interrupted: {text}\n")
        return 130
    if code != 0:
        raise ValueError(_broken_off(command.study, root, resume=resume))
    return _finish(root)


def _finish(root: Path) -> int:
    """Make the table of all rows and show it."""
    found = rows.read(root)
    failed = [row for row in found if row["error"]]
    if len(failed) == len(found):
        rows.show(found)
        shutil.rmtree(root / rows.FOLDER, ignore_errors=True)
        sweep_folder.restore(root)
        return 1
    rows.write_tables(found, root)
    sweep_folder.settle(root, found)
    rows.show(found)
    tables.console().print(f"saved in {root}", soft_wrap=True)
    return 1 if failed else 0


def _broken_off(study: str, root: Path, *, resume: bool) -> str:
    """Keep what is done, or else what was there before; what to tell of it."""
    num_finished = len(rows.read(root))
    if not num_finished:
        sweep_folder.restore(root)
        return f"study {study}: the sweep was refused before any point was done; see above"
    sweep_folder.keep_for_later(root, resume=resume)
    return (
        f"study {study}: the sweep broke off after {num_finished} points, which are kept in "
        f"{root}; the same command with resume=true does the rest"
    )


def point(config: DictConfig) -> None:
    """Simulate one point and write its row; what goes wrong is the row's error.

    Runs in a worker of the launcher: it must not raise, or the other points would be lost.
    """
    root = Path(config.out)
    overrides = rows.choices(HydraConfig.get().overrides.task)
    name = f"{digest(overrides)}.json"
    row: dict[str, Any] = {"choices": overrides, "identity": None, "error": "", "figures": {}}
    try:
        study = typed(config)
        row["identity"] = identity(study.scenario)
        if study.resume and sweep_folder.take(root, name, row["identity"]):
            return
        from scenarios.run import simulate

        result = simulate(study.scenario, progress=False)
        row["figures"] = rows.figures(result.intervals())
        folder = root / sweep_folder.POINTS / rows.slug(overrides)
        save(result, folder, study.save or Save.summary)
    except Exception as error:  # a policy of the user's own may raise anything
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        row["error"] = f"{kind}{explain(error)}"
    rows.write(root / rows.FOLDER / name, row)
    sys.stderr.write(f"{'failed' if row['error'] else 'done'}: {rows.label(overrides)}\n")


def hydra_main(command: Command, arguments: Sequence[str]) -> int:
    """Hand a command line to Hydra; its exit code."""
    folders = user_folders(command.config_dir)
    register(folders)
    _pickle_users_modules()
    scratch = tempfile.mkdtemp(prefix="diptych-")
    before, study = sys.argv, command.study or SCHEMA
    settings = [*HYDRA_SETTINGS, f"hydra.sweep.dir='{scratch}'"]
    chosen = [DROPS.get(argument, argument) for argument in arguments]
    sys.argv = ["diptych run", *chosen, *settings]
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=study)(point)()
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 1
    finally:
        sys.argv = before
        shutil.rmtree(scratch, ignore_errors=True)
    return 0


def _settle(command: Command) -> tuple[DictConfig, Path]:
    """The configuration that all points share, and the folder of the sweep.

    Every value of the sweep is composed once, so that what no point can be is refused here.
    """
    assert command.study is not None
    parsed = OverridesParser.create().parse_overrides(command.overrides)
    common = [one.input_line for one in parsed if one.input_line and not one.is_sweep_override()]
    config = compose_config(command.study, common, command.config_dir, with_hydra=True)
    params = OmegaConf.to_container(config.hydra.sweeper)
    ignored = ("hydra", "out=", "resume=")
    mine = sorted(one for one in command.overrides if not one.startswith(ignored))
    named = digest([mine, params, configuration_text(config)])
    out = Path(config.out or Path("runs") / command.study / f"sweep-{named}")
    root = sweep_folder.claim(out)
    for chosen in _each_value_once(parsed, config.hydra.sweeper.params or {}):
        compose_config(command.study, [*common, *chosen], command.config_dir)
    return config, root


def _each_value_once(parsed: list[Override], params: Mapping[str, Any]) -> Iterator[list[str]]:
    """Overrides of points that together have every value of the sweep, first values first."""
    given = {one.key_or_group for one in parsed}
    lines = [f"{key}={value}" for key, value in params.items() if key not in given]
    swept = [*parsed, *OverridesParser.create().parse_overrides(lines)]
    values = {
        str(one.input_line).partition("=")[0]: list(one.sweep_string_iterator())
        for one in swept
        if one.is_choice_sweep() or one.is_range_sweep()
    }
    first = {key: f"{key}={these[0]}" for key, these in values.items() if these}
    yield list(first.values())
    for key, these in values.items():
        for value in these[1:]:
            yield list((first | {key: f"{key}={value}"}).values())


def configuration_text(config: DictConfig) -> str:
    """What the points share, as YAML without Hydra's part."""
    shared = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    shared.out, shared.resume = None, False
    return OmegaConf.to_yaml(shared)


def _pickle_users_modules() -> None:
    """A worker process cannot import a user's file by name, so its classes travel by value."""
    users = [module for name, module in sys.modules.items() if name.startswith(USER_MODULES)]
    if not users:
        return
    # Some releases of joblib bring a copy of cloudpickle, the others use the package.
    for name in ("joblib.externals.cloudpickle", "cloudpickle"):
        try:
            pickler = import_module(name)
        except ImportError:
            continue
        for module in users:
            pickler.register_pickle_by_value(module)
