"""`diptych compare A B`: what was changed between two results, and what that changed."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scenarios import tables
from scenarios.saved import Saved, load
from sim.differences import difference
from sim.result import Figure

SKIPPED = ("num_requests", "counted_requests", "overloaded")


def main(argv: Sequence[str]) -> int:
    """Compare two results, each a folder or a summary.json.

    Raises:
        ValueError: not two, or one cannot be read.
    """
    if len(argv) != 2:
        raise ValueError(
            f"compare takes two results and got {len(argv)}; name two folders that `diptych run` "
            "wrote, below runs/"
        )
    compare(load(Path(argv[0])), load(Path(argv[1])))
    return 0


def compare(first: Saved, second: Saved) -> None:
    """Print what differs in the configuration, then every figure, then where TTFT went."""
    out = tables.console()
    out.print(f"A  {first.folder}\nB  {second.folder}", soft_wrap=True, markup=False)
    changes = changed(first.configuration, second.configuration)
    table = tables.grid("configuration", "key", "A", "B", left=3)
    for key, (one, other) in changes.items():
        table.add_row(key, _text(one), _text(other))
    out.print(table if changes else "the configuration is the same")
    out.print(_figures(first, second))
    for label, saved in (("A", first), ("B", second)):
        if saved.summary["overloaded_seeds"]:
            reason = tables.overload_reason(saved.summary["overloaded_seeds"], saved.num_seeds)
            out.print(f"{label} is overloaded: {reason}", soft_wrap=True)
    out.print(_why(first.figures, second.figures), soft_wrap=True)


def changed(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, with both; a key that only one has shows None for the other."""
    flat_one, flat_other = flatten(one), flatten(other)
    keys = list(dict.fromkeys((*flat_one, *flat_other)))
    # A machine that was exchanged differs in all its numbers: its name says enough.
    for part in ("node.", "gpu."):
        if flat_one.get(f"{part}name") != flat_other.get(f"{part}name"):
            keys = [key for key in keys if not key.startswith(part) or key == f"{part}name"]
    return {
        key: (flat_one.get(key), flat_other.get(key))
        for key in keys
        if flat_one.get(key) != flat_other.get(key)
    }


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings by their dotted path."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _figures(first: Saved, second: Saved) -> Any:
    """Every figure of both, and how sure their difference is."""
    ones, others = first.figures, second.figures
    paired = first.saw_the_requests_of(second)
    each = (first.seed_figures, second.seed_figures)
    sure = min(first.num_seeds, second.num_seeds) > 1
    columns = ["", "A", "B", "B - A", "B / A", *(["differ"] if sure else [])]
    table = tables.grid("figures", *columns)
    for name in ones:
        if name in SKIPPED or name not in others:
            continue
        one, other = ones[name].mean, others[name].mean
        if math.isnan(one) and math.isnan(other):
            continue
        change = difference(each[0][name], each[1][name], paired=paired)
        ratio = other / one if one else math.nan
        values = [tables.quantity(name, value) for value in (one, other)]
        values += [tables.with_interval(name, change)]
        values += [f"{ratio:.3f}" if math.isfinite(ratio) else "-"]
        table.add_row(_label(name), *values, *([_differ(change)] if sure else []))
    if sure:
        table.caption = "± half of the 95 % interval over the seeds, " + (
            "paired: both saw the same requests" if paired else "Welch's: they saw other requests"
        )
        table.caption_justify = "left"
    return table


def _label(name: str) -> str:
    short = name.removesuffix("_per_s").removesuffix("_s").removesuffix("_at_power_limit")
    first, _, rest = short.partition("_")
    return f"{tables.LATENCIES.get(first, first)} {rest.replace('_', ' ')}".strip()


def _differ(change: Figure) -> str:
    """Whether the interval of a difference leaves out zero."""
    if change.half is None or math.isnan(change.mean):
        return "-"
    if change.mean == 0 and change.half == 0:
        return "equal"
    return "yes" if abs(change.mean) > change.half else "not sure"


def _why(ones: Mapping[str, Figure], others: Mapping[str, Figure]) -> str:
    """Where the difference of the mean TTFT comes from."""
    change = others["ttft_mean_s"].mean - ones["ttft_mean_s"].mean
    if math.isnan(change):
        return "mean TTFT: not known for an overloaded run"
    parts = {
        label: moved
        for name, label in tables.TTFT_PARTS.items()
        if name in ones
        and name in others
        # Where nothing is retrieved, nothing is searched.
        and not math.isnan(moved := others[name].mean - ones[name].mean)
    }
    split = ", ".join(f"{part} {_signed(value)}" for part, value in parts.items())
    main = max(parts, key=lambda part: abs(parts[part]))
    return f"mean TTFT {_signed(change)}: {split}; the largest change is in {main}"


def _signed(value: float) -> str:
    return ("+" if value >= 0 else "") + tables.seconds(value)


def _text(value: Any) -> str:
    return "null" if value is None else str(value)
