"""Files and folders that are written whole or not at all, and only where they may be."""

import json
import os
import shutil
import tempfile
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

BUILDING = ".diptych-"
"""What the name of everything begins with that is not complete yet."""


def claim_file(path: Path) -> None:
    """Refuse a file that could not be written in the end.

    Raises:
        ValueError: it is a folder, or cannot be written.
    """
    if path.is_dir():
        raise ValueError(f"out={path} is a folder and must be a file; name a file below it")
    with _refusing(path):
        _try_to_make(path.resolve())


def claim_folder(folder: Path, ours: Iterable[str], what: str) -> Path:
    """Where `folder` really is, if it may be made, or replaced because all in it is ours.

    Args:
        folder: the user's `out`.
        ours: patterns of the files that such a folder may hold, part by part.
        what: such a folder holds, in a word.

    Raises:
        ValueError: it cannot be written, or holds something of somebody else's.
    """
    with _refusing(folder):
        place = folder.resolve()
        if place.exists():
            _require_ours(folder, place, list(ours), what)
        _try_to_make(place)
    return place


@contextmanager
def _refusing(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"out={path} cannot be written ({error.strerror}); name another place"
        ) from error


def _require_ours(folder: Path, place: Path, ours: list[str], what: str) -> None:
    if not place.is_dir():
        raise ValueError(f"out={folder} is a file and must be a folder; name another one")
    if Path.cwd().is_relative_to(place):
        raise ValueError(
            f"out={folder} is the folder that you are in, or holds it; name one below, such as "
            "out=runs/mine"
        )
    files = (path.relative_to(place) for path in place.rglob("*") if not path.is_dir())
    foreign = next((path for path in sorted(files) if not _matches(path, ours)), None)
    if foreign is not None:
        raise ValueError(
            f"out={folder} is not empty and holds {foreign}, which is no part of a {what}; name "
            "another folder"
        )


def _matches(path: PurePath, patterns: list[str]) -> bool:
    if any(part.startswith(BUILDING) for part in path.parts):
        return True
    return any(
        path.match(pattern) and len(path.parts) == len(PurePath(pattern).parts)
        for pattern in patterns
    )


def _try_to_make(place: Path) -> None:
    """Raise what making something there would raise, and leave nothing."""
    there = next(path for path in place.parents if path.exists())
    trial = Path(tempfile.mkdtemp(prefix=BUILDING, dir=there))
    try:
        for part in place.relative_to(there).parts:
            (trial / part).mkdir()
    finally:
        shutil.rmtree(trial)


@contextmanager
def whole_folder(folder: Path) -> Generator[Path]:
    """A folder to fill; it takes its name when all is written, and vanishes when that fails.

    What had the name before is moved aside first and deleted last: a crash loses neither.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=BUILDING, dir=folder.parent))
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
    handle, name = tempfile.mkstemp(prefix=BUILDING, dir=path.parent)
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
