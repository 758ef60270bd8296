"""`diptych run -m`: every point of a sweep through Hydra's launchers, and one table of them all.

Each point writes its row by itself and atomically, so that a crash loses that point only. The table
is made of the rows, sorted by configuration: its bytes do not depend on launcher or workers.
"""

import shutil
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from scenarios import rows, tables
from scenarios.compose import DROPS, Command, compose_config, typed
from scenarios.explain import explain
from scenarios.folders import CONF, user_folders
from scenarios.register import SCHEMA, register
from scenarios.saving import digest, save
from scenarios.study import Save
from sim.policies.registry import USER_MODULES
from sim.result import configuration

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
    """Run all points; 0 if every one succeeded, else 1.

    Raises:
        ValueError: the study or its sweep cannot be composed; nothing was written.
    """
    assert command.study is not None
    base, root = _settle(command)
    _prepare(root, resume=bool(base.resume))
    overrides = [one for one in command.overrides if not one.startswith(("out=", "resume="))]
    quoted = str(root).replace("'", "\\'")
    overrides += [f"out='{quoted}'", f"resume={str(base.resume).lower()}"]
    code = hydra_main(command, ["--multirun", *overrides])
    found = rows.read(root)
    if code != 0:
        raise ValueError(_how_it_ended(command.study, root, len(found)))
    failed = [row for row in found if row["error"]]
    if len(failed) == len(found):
        rows.show(found)
        _discard(root)
        return 1
    rows.write_tables(found, root)
    rows.show(found)
    tables.console().print(f"saved in {root}", soft_wrap=True)
    return 1 if failed else 0


def point(config: DictConfig) -> None:
    """Simulate one point and write its row; what goes wrong is the row's error.

    Runs in a worker of the launcher: it must not raise, or the other points would be lost.
    """
    root = Path(config.out)
    overrides = rows.choices(HydraConfig.get().overrides.task)
    path = root / rows.FOLDER / f"{digest(overrides)}.json"
    row: dict[str, Any] = {"choices": overrides, "configuration": None, "error": "", "figures": {}}
    try:
        study = typed(config)
        row["configuration"] = digest(configuration(study.scenario))
        if study.resume and rows.is_done(path, row["configuration"]):
            return
        from scenarios.run import simulate

        result = simulate(study.scenario, progress=False)
        row["figures"] = rows.figures(result.intervals())
        save(result, root / "points" / rows.slug(overrides), study.save or Save.summary)
    except Exception as error:  # a policy of the user's own may raise anything
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        row["error"] = f"{kind}{explain(error)}"
    rows.write(path, row)
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
    """The configuration that all points share, and the folder of the sweep."""
    assert command.study is not None
    parsed = OverridesParser.create().parse_overrides(command.overrides)
    common = [one.input_line for one in parsed if one.input_line and not one.is_sweep_override()]
    config = compose_config(command.study, common, command.config_dir, with_hydra=True)
    groups = config.hydra.runtime.choices
    swept = [one for one in parsed if one.is_sweep_override() and one.key_or_group in groups]
    for one in swept:
        for choice in one.sweep_string_iterator():
            # Composed by itself, an unknown choice is refused here and not by each worker.
            alone = f"{one.key_or_group}={choice}"
            compose_config(command.study, [*common, alone], command.config_dir)
    params = OmegaConf.to_container(config.hydra.sweeper)
    ignored = ("hydra", "out=", "resume=")
    mine = sorted(one for one in command.overrides if not one.startswith(ignored))
    named = digest([mine, params, configuration_text(config)])
    return config, Path(config.out or Path("runs") / command.study / f"sweep-{named}").absolute()


def configuration_text(config: DictConfig) -> str:
    """What the points share, as YAML without Hydra's part."""
    shared = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    shared.out, shared.resume = None, False
    return OmegaConf.to_yaml(shared)


def _prepare(root: Path, *, resume: bool) -> None:
    holds_sweep = (root / rows.FOLDER).is_dir() or (root / rows.TABLE).exists()
    if root.exists() and not holds_sweep and any(root.iterdir()):
        raise ValueError(f"out={root} is not empty and holds no sweep; name another folder")
    if not resume:
        shutil.rmtree(root / rows.FOLDER, ignore_errors=True)


def _how_it_ended(study: str, root: Path, num_finished: int) -> str:
    if not num_finished:
        _discard(root)
        return f"study {study}: the sweep was refused before it ran; see above"
    return (
        f"study {study}: the sweep broke off after {num_finished} points, which are kept in "
        f"{root}; the same command with resume=true does the rest"
    )


def _discard(root: Path) -> None:
    """Leave nothing of a sweep of which nothing was accepted."""
    shutil.rmtree(root / rows.FOLDER, ignore_errors=True)
    if root.is_dir() and not any(root.iterdir()):
        root.rmdir()


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
