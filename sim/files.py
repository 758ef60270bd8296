"""Files and folders that are written whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_folder(folder: Path) -> Generator[Path]:
    """A folder to fill; it takes its name when all is written, and vanishes when that fails.

    What had the name before is moved aside first and deleted last: a crash loses neither.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    aside = building.with_name(f"{building.name}-old")
    try:
        yield building
        building.chmod(0o755)
        if folder.exists():
            folder.rename(aside)
        building.rename(folder)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        if aside.exists() and not folder.exists():
            aside.rename(folder)
        shutil.rmtree(building, ignore_errors=True)
        raise


@contextmanager
def whole_file(path: Path) -> Generator[Path]:
    """A file to write; it takes its name when all is written, and vanishes when that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON types, complete or not at all."""
    with whole_file(path) as building:
        building.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
