"""YAML files and the parts that they name, without Hydra.

The subset of Hydra's defaults list that parts use: `- name` (same kind), `- /kind@field: name`
and `- _self_`. Later entries win over earlier ones, key by key, as Hydra merges.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from hardware_models.names import alternatives
from hardware_models.typed import Place

SHIPPED = Path(__file__).parent
"""Folder of the parts that come with the package."""

_PART = re.compile(r"^/(?P<kind>\w+)@(?P<field>\w+)$")


class _Loader(yaml.SafeLoader):
    """Reads 1e9 as a number, as Hydra does, and refuses a key that is given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise ValueError(f"key {key.value!r} is given twice; keep one")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


cast(Any, _Loader).add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def find_part(kind: str, name: str, folders: Sequence[Path] = ()) -> Path:
    """The file of a part; the user's folders are searched before the shipped parts.

    Raises:
        ValueError: no folder has it. The message says what is near and lists what there is.
    """
    for folder in (*folders, SHIPPED):
        path = folder / kind / f"{name}.yaml"
        if path.is_file():
            return path
    known = part_names(kind, folders)
    raise ValueError(f"{kind}={name!r} is not known; {alternatives(name, known)}")


def part_names(kind: str, folders: Sequence[Path] = ()) -> list[str]:
    """Names of all parts of a kind, sorted."""
    found = {path.stem for folder in (*folders, SHIPPED) for path in (folder / kind).glob("*.yaml")}
    return sorted(found)


def compose(kind: str, path: Path, folders: Sequence[Path] = ()) -> dict[str, object]:
    """Plain data of one file with the parts that it names filled in.

    Raises:
        ValueError: the file is not a YAML mapping, or names a part in a form or by a name that
            is not known.
    """
    return _compose(kind, path, folders, ())


def _compose(
    kind: str, path: Path, folders: Sequence[Path], trail: tuple[Path, ...]
) -> dict[str, object]:
    place = Place(str(path))
    if path in trail:
        raise place.refuse("defaults lead back to this file; break the circle")
    trail = (*trail, path)
    own = _read(path, place)
    defaults = own.pop("defaults", ["_self_"])
    if not isinstance(defaults, list):
        raise place.refuse(f"defaults={defaults!r} must be a list; write one '- ...' per part")
    entries = cast(list[object], defaults)
    if "_self_" not in entries:
        entries = [*entries, "_self_"]
    merged: dict[str, object] = {}
    for entry in entries:
        merged = _merge(merged, own if entry == "_self_" else _part(kind, entry, folders, trail))
    return merged


def _part(
    kind: str, entry: object, folders: Sequence[Path], trail: tuple[Path, ...]
) -> Mapping[str, object]:
    if isinstance(entry, str):
        return _named(kind, entry, folders, trail)
    if isinstance(entry, dict) and len(cast(dict[str, object], entry)) == 1:
        ((key, name),) = cast(dict[str, object], entry).items()
        match = _PART.match(key)
        if match and isinstance(name, str):
            return {match["field"]: _named(match["kind"], name, folders, trail)}
    raise Place(str(trail[-1])).refuse(
        f"defaults has {entry!r}; write '- name', '- /kind@field: name' or '- _self_'"
    )


def _named(
    kind: str, name: str, folders: Sequence[Path], trail: tuple[Path, ...]
) -> dict[str, object]:
    try:
        path = find_part(kind, name, folders)
    except ValueError as error:
        raise Place(str(trail[-1])).refuse(f"defaults: {error}") from error
    return _compose(kind, path, folders, trail)


def _merge(base: Mapping[str, object], top: Mapping[str, object]) -> dict[str, object]:
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = _merge(cast(Any, below), cast(Any, value)) if both else value
    return merged


def _read(path: Path, place: Place) -> dict[str, object]:
    try:
        data: object = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise place.refuse(f"cannot be read ({error.strerror}); check the path") from error
    except (yaml.YAMLError, ValueError) as error:
        raise place.refuse(f"is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise place.refuse(f"has {data!r}; a part must be a mapping of keys to values")
    return cast(dict[str, object], data)
