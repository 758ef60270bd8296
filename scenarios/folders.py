"""Folders of the user's own: studies, policies, workloads, models and hardware beside the shipped.

Their layout is that of the packages: `<folder>/<study>.yaml`, `<folder>/model/<name>.yaml`,
`<folder>/gpu/<name>.yaml`, `<folder>/policies/<family>/<rule>.py`, `<folder>/workload/<name>.py`,
`<folder>/token_routing/<name>.py`.
"""

import os
from collections.abc import Sequence
from pathlib import Path

CONF = Path(__file__).parent / "conf"
"""Shipped studies."""
VARIABLE = "DIPTYCH_PATH"
OWN = Path("~/.config/diptych")
"""Searched last, where it exists: `diptych calibrate` writes there."""
FLAGS = ("--config-dir", "-cd")


def user_folders(config_dir: str | None = None) -> list[Path]:
    """Folders to search before the shipped parts, the first one wins.

    In this order: `config_dir` (of `--config-dir`), those of DIPTYCH_PATH, and `OWN`.

    Raises:
        ValueError: a named folder does not exist.
    """
    named = [(FLAGS[0], config_dir)] if config_dir else []
    named += [(VARIABLE, part) for part in os.environ.get(VARIABLE, "").split(os.pathsep) if part]
    found: list[Path] = []
    for origin, text in named:
        folder = Path(text).expanduser().absolute()
        if not folder.is_dir():
            raise ValueError(f"{origin}={text} must be a folder and is not; correct the path")
        found.append(folder)
    own = OWN.expanduser()
    return [*found, own] if own.is_dir() else found


def config_dir_of(argv: Sequence[str]) -> str | None:
    """The folder that `--config-dir DIR` (or `-cd DIR`, `--config-dir=DIR`) names."""
    for place, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if flag in FLAGS:
            return value if equals else next(iter(argv[place + 1 : place + 2]), None)
    return None
