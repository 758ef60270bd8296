"""Read an architecture from a Hugging Face config.json: a shipped one by name, or any other."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from sim.models.config_file import ConfigFile
from sim.models.dimensions import Architecture
from sim.models.families import READERS

__all__ = ["Architecture", "config_path", "known_architectures", "load_architecture"]

_SHIPPED = Path(__file__).parent / "configs"


def known_architectures() -> tuple[str, ...]:
    """Names of the shipped architectures, in order."""
    return tuple(sorted(path.stem for path in _SHIPPED.glob("*.json")))


def config_path(path_or_name: str | Path) -> Path:
    """The config.json that a shipped name, a model folder or a path stands for.

    A shipped name wins over a path of the same spelling; write `./name` for the path.

    Raises:
        ValueError: there is no such name and no such file.
    """
    if path_or_name in known_architectures():
        return _SHIPPED / f"{path_or_name}.json"
    path = Path(path_or_name)
    if path.is_dir():
        path /= "config.json"
    if not path.is_file():
        raise ValueError(
            f"model {str(path_or_name)!r} is neither a file, nor a folder with a config.json, nor "
            f"one of the known architectures: {', '.join(known_architectures())}"
        )
    return path


def load_architecture(source: str | Path | Mapping[str, object]) -> Architecture:
    """The architecture of a shipped name, a config.json, a folder with one, or its parsed values.

    Named after the shipped name, the folder or the file; values are named by their family.

    Raises:
        ValueError: nothing there, an unknown `model_type`, or a missing or impossible value; the
            message begins with the file.
    """
    if isinstance(source, Mapping):
        return _read(None, source, "config")
    path = config_path(source)
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    try:
        values: object = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold one JSON object, not a {type(values).__name__}")
    return _read(name, cast("dict[str, object]", values), str(path))


def _read(name: str | None, values: Mapping[str, object], source: str) -> Architecture:
    family = values.get("model_type")
    if not isinstance(family, str) or family not in READERS:
        raise ValueError(
            f"{source}: model_type={family!r} is not known; known are {', '.join(READERS)}"
        )
    try:
        return READERS[family](name or family, ConfigFile(values))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
