"""The folder of a sweep: what an earlier one left is moved aside and lost only to a better one."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from scenarios import rows
from sim.files import claim_folder
from sim.result import FILES

POINTS = "points"
BEFORE = ".before"
"""What was there before, while a sweep runs."""
PARTS = (rows.FOLDER, POINTS, rows.TABLE, rows.PARQUET)
ROW = f"{rows.FOLDER}/{'[0-9a-f]' * 10}.json"
OURS = (ROW, rows.TABLE, rows.PARQUET, *(f"{POINTS}/*/{name}" for name in FILES))


def claim(out: Path) -> Path:
    """Where a sweep goes, if nothing but an earlier sweep is there.

    Raises:
        ValueError: it cannot be written, or the folder holds anything else.
    """
    return claim_folder(out, (*OURS, *(f"{BEFORE}/{name}" for name in OURS)), "sweep")


def put_aside(root: Path, *, resume: bool) -> None:
    """Move aside what an earlier sweep left; a resumed one takes over its rows, see `take`.

    A resumed sweep keeps the results of points where they are.
    """
    before = root / BEFORE
    if resume:
        _merge(root / rows.FOLDER, before / rows.FOLDER)
        return
    shutil.rmtree(before, ignore_errors=True)
    _move(PARTS, root, before)


def take(root: Path, name: str, identity: str) -> bool:
    """Take over the row of an earlier sweep, if it is of this very point and without an error."""
    path, target = root / BEFORE / rows.FOLDER / name, root / rows.FOLDER / name
    if not path.exists():
        return False
    row = json.loads(path.read_text(encoding="utf-8"))
    if row.get("identity") != identity or row["error"]:
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    path.replace(target)
    return True


def restore(root: Path) -> None:
    """Back to what was there: nothing of the new sweep was accepted."""
    if (root / BEFORE).is_dir():
        _merge(root / BEFORE / rows.FOLDER, root / rows.FOLDER)
        _move(PARTS, root / BEFORE, root)
        shutil.rmtree(root / BEFORE)
    for folder in (root / rows.FOLDER, root / POINTS, root):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def keep_for_later(root: Path, *, resume: bool) -> None:
    """The sweep broke off: its rows stay, and so do those that it had yet to take over."""
    if resume:
        _merge(root / BEFORE / rows.FOLDER, root / rows.FOLDER)
    shutil.rmtree(root / BEFORE, ignore_errors=True)


def settle(root: Path, found: Iterable[rows.Row]) -> None:
    """The sweep is complete: what belongs to none of its points goes."""
    shutil.rmtree(root / BEFORE, ignore_errors=True)
    kept = {rows.slug(row["choices"]) for row in found if not row["error"]}
    for folder in (root / POINTS).glob("*"):
        if folder.name not in kept:
            shutil.rmtree(folder)


def _move(names: Iterable[str], source: Path, target: Path) -> None:
    for name in names:
        if (source / name).exists():
            target.mkdir(parents=True, exist_ok=True)
            if (target / name).is_dir():
                shutil.rmtree(target / name)
            (source / name).replace(target / name)


def _merge(source: Path, target: Path) -> None:
    """Move the rows of one folder into another where that lacks them."""
    for path in source.glob("[!.]*.json"):
        target.mkdir(parents=True, exist_ok=True)
        if not (target / path.name).exists():
            path.replace(target / path.name)
    shutil.rmtree(source, ignore_errors=True)
