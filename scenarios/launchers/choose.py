"""Which launchers there are, and what has to be installed for each."""

from importlib import import_module
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from scenarios.explain import explain
from scenarios.launchers.base import Launcher
from scenarios.launchers.extras import NEEDS, installed

GROUP = "hydra/launcher"
KINDS = {
    "basic": ("scenarios.launchers.in_process", "InProcess"),
    "joblib": ("scenarios.launchers.joblib_workers", "JoblibWorkers"),
    "ray": ("scenarios.launchers.ray_tasks", "RayTasks"),
    "submitit_local": ("scenarios.launchers.submitit_jobs", "SubmititLocal"),
    "submitit_slurm": ("scenarios.launchers.submitit_jobs", "SubmititSlurm"),
}
"""Name -> module and class."""


def register() -> None:
    """Make every launcher that is installed known to Hydra, with its settings."""
    store = ConfigStore.instance()
    for name, (module, kind) in KINDS.items():
        package, _ = NEEDS.get(name, ("", ""))
        if not package or installed(package):
            store.store(group=GROUP, name=name, node=getattr(import_module(module), kind))


def launcher(config: DictConfig) -> Launcher:
    """The launcher of a composed configuration.

    Raises:
        ValueError: it is none of ours, or a setting is refused.
    """
    try:
        chosen: Any = OmegaConf.to_object(config.hydra.launcher)
    except OmegaConfBaseException as error:
        raise ValueError(explain(error)) from error
    if not isinstance(chosen, Launcher):
        raise ValueError(
            f"{GROUP}={config.hydra.runtime.choices[GROUP]} is not a launcher of Diptych; there "
            f"are: {', '.join(KINDS)}"
        )
    return chosen
