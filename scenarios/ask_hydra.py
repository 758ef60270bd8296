"""Flags that Hydra answers itself, such as `--cfg job`: the composed study, without running it."""

import shutil
import sys
import tempfile

import hydra
from omegaconf import DictConfig

from scenarios.compose import DROPS, Command
from scenarios.folders import CONF, user_folders
from scenarios.register import SCHEMA, register

SETTINGS = (
    "hydra/job_logging=disabled",
    "hydra/hydra_logging=disabled",
    "hydra.output_subdir=null",
    "hydra.job.chdir=false",
    "hydra.run.dir=.",
)
"""Hydra writes no folders, logs or copies: results are ours, and appear when accepted."""


def ask_hydra(command: Command) -> int:
    """Hand a command line to Hydra; its exit code."""
    register(user_folders(command.config_dir))
    scratch = tempfile.mkdtemp(prefix="diptych-")
    before, study = sys.argv, command.study or SCHEMA
    chosen = [DROPS.get(override, override) for override in command.overrides]
    settings = [*SETTINGS, f"hydra.sweep.dir='{scratch}'"]
    sys.argv = ["diptych run", *command.flags, *chosen, *settings]
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=study)(_refuse)()
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 1
    finally:
        sys.argv = before
        shutil.rmtree(scratch, ignore_errors=True)
    return 0


def _refuse(_: DictConfig) -> None:
    """Hydra would run the study after a flag that only sets something."""
    sys.stderr.write("error: with flags of Hydra nothing is run; leave them out\n")
    sys.exit(2)
