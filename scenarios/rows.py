"""Rows of a sweep, one file a point, and the table that is printed of them."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scenarios import tables
from scenarios.saving import digest
from sim.files import write_json
from sim.result import Figure, plain

FOLDER = "rows"
TABLE = "sweep.csv"
PARQUET = "sweep.parquet"
SHOWN = {
    "throughput_requests_per_s": "requests/s", "goodput_requests_per_s": "goodput/s",
    "slo_share": "met SLO", "ttft_p50_s": "TTFT p50", "ttft_p99_s": "TTFT p99",
    "tpot_p50_s": "TPOT p50", "itl_p99_s": "ITL p99",
}  # fmt: skip
"""Figures of the printed table and their headings; the files hold all, with intervals."""

DIGEST = "digest"
Row = Mapping[str, Any]
"""Of a point: `choices`, `identity` (of `saving`), `configuration`, `error`, `figures`."""


class Damaged(ValueError):
    """A file of a sweep is not what was written."""


def choices(overrides: Sequence[str]) -> dict[str, str]:
    """What a point chose, by key; what is the command line's own is left out."""
    pairs = (override.lstrip("+~").partition("=") for override in overrides)
    return {key: value for key, _, value in sorted(pairs) if key not in ("out", "resume", "save")}


def figures(found: Mapping[str, Figure]) -> dict[str, float | None]:
    """Means and half-widths as columns; what is not a number is null."""
    columns: dict[str, float | None] = {}
    for name, (mean, half) in found.items():
        columns[name] = mean if math.isfinite(mean) else None
        if half is not None:
            columns[f"{name}_half"] = half if math.isfinite(half) else None
    return columns


def label(chosen: Mapping[str, str]) -> str:
    """A point in words."""
    return " ".join(f"{key}={value}" for key, value in chosen.items()) or "the study as it is"


def slug(chosen: Mapping[str, str]) -> str:
    """A point as a folder name: readable, and unlike that of any other point."""
    text = re.sub(r"[^\w.=,+-]+", ".", ",".join(f"{k}={v}" for k, v in chosen.items()))
    return f"{text[:80]}-{digest(chosen)}".lstrip("-.")


def varying(found: Sequence[Row]) -> list[str]:
    """The keys in which points differ."""
    keys = union(row["choices"] for row in found)
    return [key for key in keys if len({row["choices"].get(key) for row in found}) > 1]


def path_of(root: Path, chosen: Mapping[str, str]) -> Path:
    """The file of a point's row."""
    return root / FOLDER / f"{digest(chosen)}.json"


def write(root: Path, row: Row) -> None:
    """Write a row into its file, complete or not at all, with a digest of its content."""
    content = plain(row)
    write_json(path_of(root, row["choices"]), {**content, DIGEST: digest(content)})


def read_one(path: Path, name: Path | None = None) -> Row:
    """A row as it was written.

    Args:
        path: where it is.
        name: what to call it, if it was moved.

    Raises:
        Damaged: the file is not what was written.
    """
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Damaged(f"{name or path} is damaged ({error})") from error
    content = {k: v for k, v in row.items() if k != DIGEST} if isinstance(row, dict) else {}
    if not content or row.get(DIGEST) != digest(content):
        raise Damaged(f"{name or path} is damaged (its content was changed after it was written)")
    return content


def read(root: Path) -> list[Row]:
    """All rows of a sweep, sorted by what their points chose.

    Raises:
        Damaged: a file of them is not what was written.
    """
    try:
        return sorted((read_one(path) for path in _files(root)), key=order)
    except Damaged as error:
        raise Damaged(f"{error}; the same sweep with resume=true does its point again") from error


def show(found: Sequence[Row], first: Mapping[str, str] | None = None) -> None:
    """Print what differs between points and their main figures, then what failed and why.

    Args:
        found: the rows.
        first: figures to print before the others, with their headings.
    """
    headings = {**(first or {}), **SHOWN}
    differing = varying(found)
    heads = [key.split(".")[-1].removeprefix("policy/") for key in differing]
    table = tables.grid(None, *heads, *headings.values(), left=len(differing))
    for row in found:
        if not row["error"]:
            chosen = [row["choices"].get(key, "") for key in differing]
            table.add_row(*chosen, *_cells(row["figures"], headings))
    out = tables.console()
    out.print(table)
    failed = [row for row in found if row["error"]]
    for row in failed:
        out.print(f"[red]failed[/] {label(row['choices'])}:", soft_wrap=True)
        out.print(f"  {row['error']}", markup=False, soft_wrap=True)
    if failed:
        out.print(f"{len(failed)} of {len(found)} points failed")


def _cells(row: Mapping[str, float | None], names: Iterable[str]) -> list[str]:
    cells: list[str] = []
    for name in names:
        value = row.get(name)
        latency = name.startswith(tuple(tables.LATENCIES))
        if value is None:
            cells.append("overload" if latency and row.get("overloaded") else "-")
        else:
            text = tables.quantity(name, value)
            cells.append(text.removesuffix(" requests/s"))
    return cells


def _files(root: Path) -> list[Path]:
    return sorted((root / FOLDER).glob("[!.]*.json"))


def order(row: Row) -> list[tuple[str, float, str]]:
    """Numbers among each other by size, words by alphabet."""
    return [(key, _as_number(value), value) for key, value in sorted(row["choices"].items())]


def _as_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.inf


def union(mappings: Any) -> list[str]:
    """Keys in order of first appearance."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))
