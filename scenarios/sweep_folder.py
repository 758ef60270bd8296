"""The folder of a sweep: what an earlier one left is moved aside and lost only to a better one."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from scenarios import rows
from scenarios.saved import load
from scenarios.study import Save
from sim.files import claim_folder
from sim.result import FILES, SUMMARY

POINTS = "points"
BEFORE = ".before"
"""What was there before, while a sweep runs."""
SEARCH, PICTURE = "search.json", "pareto.png"
"""What a search found, and what a report draws."""
PARTS = (rows.FOLDER, POINTS, rows.TABLE, rows.PARQUET, SEARCH, PICTURE)
ROW = f"{rows.FOLDER}/{'[0-9a-f]' * 10}.json"
OURS = (ROW, rows.TABLE, rows.PARQUET, SEARCH, PICTURE, *(f"{POINTS}/*/{name}" for name in FILES))


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


def take(root: Path, chosen: Mapping[str, str], identity: str, level: Save) -> bool:
    """Take over the row of an earlier sweep, if it is of this very point and without an error.

    Args:
        root: folder of the sweep.
        chosen: what the point chose.
        identity: of its configuration, code and data; see `saving.identity`.
        level: how much of its result has to be there.

    Raises:
        Damaged: the row, or the result that it tells of, is not what was written.
    """
    target = rows.path_of(root, chosen)
    path = root / BEFORE / rows.FOLDER / target.name
    if not path.exists():
        return False
    row = rows.read_one(path, target)
    if row["identity"] != identity or row["error"]:
        return False
    _require_result(root / POINTS / rows.slug(chosen), row, level)
    target.parent.mkdir(parents=True, exist_ok=True)
    path.replace(target)
    return True


def _require_result(folder: Path, row: rows.Row, level: Save) -> None:
    """Refuse a result that is damaged, lacks what is to be saved, or is of other figures."""
    try:
        saved = load(folder)
        if level is not Save.summary:
            _require_parquet(folder / "requests.parquet")
        if level is Save.trace:
            saved.trace()
    except (ValueError, OSError) as error:
        raise rows.Damaged(f"the result in {folder} is missing or damaged ({error})") from error
    figures = saved.summary["figures"]
    if any(row["figures"].get(name) != value for name, value in figures.items()):
        raise rows.Damaged(f"{folder / SUMMARY} is damaged (its figures are not those of its row)")


def _require_parquet(path: Path) -> None:
    # Rows alone need no pyarrow, whose import takes a while.
    import pyarrow.parquet as pq

    pq.read_table(path)


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
