"""Packages that a launcher needs, and the extras of ours that install them."""

from importlib.util import find_spec

NEEDS = {
    "joblib": ("joblib", "sweeps"),
    "ray": ("ray", "ray"),
    "submitit_local": ("hydra_plugins.hydra_submitit_launcher", "slurm"),
    "submitit_slurm": ("hydra_plugins.hydra_submitit_launcher", "slurm"),
}
"""Launcher -> package that it needs, and the extra that installs it."""


def missing(launcher: str) -> str:
    """What to install for a launcher, or nothing where all is there."""
    package, extra = NEEDS.get(launcher, ("", ""))
    if not package or installed(package):
        return ""
    return (
        f"hydra/launcher={launcher} needs the package {package.rpartition('.')[2]}, which is not "
        f"installed; pip install 'diptych[{extra}]'"
    )


def require_optuna() -> None:
    """Refuse a search where its library is not installed.

    Raises:
        ValueError: it is missing; the message names the extra.
    """
    if not installed("optuna"):
        raise ValueError(
            "`diptych search` needs the package optuna, which is not installed; "
            "pip install 'diptych[search]'"
        )


def installed(package: str) -> bool:
    """Whether a package can be imported."""
    try:
        return find_spec(package) is not None
    except (ModuleNotFoundError, ValueError):  # the package around it is missing, or hidden
        return False
