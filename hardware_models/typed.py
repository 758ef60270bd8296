"""Plain data to typed records and back, with the file and the key in every refusal."""

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar

from hardware_models.names import alternatives

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value was read: a file and the dotted key in it."""

    file: str
    """File or other origin, as it is to be shown."""
    key: str = ""
    """Dotted key; empty at the top."""

    def child(self, key: str) -> "Place":
        """The place of one key below this one."""
        return Place(self.file, f"{self.key}.{key}" if self.key else key)

    def refuse(self, message: str) -> ValueError:
        """An error that starts with this place."""
        return ValueError(f"{self.file}: {message}")


def record_from(cls: type[T], data: Mapping[str, object], place: Place) -> T:
    """Build a record from plain data; whole numbers are accepted where a float is due.

    Raises:
        ValueError: a key is unknown or missing, a value has the wrong type, or the record's own
            rules refuse it.
    """
    known = {field.name: field for field in fields(typing.cast(Any, cls))}
    for key in data:
        if key not in known:
            raise place.refuse(_unknown_key(cls, key, list(known), place))
    hints = typing.get_type_hints(cls)
    values: dict[str, object] = {}
    for name, field in known.items():
        at = place.child(name)
        if name in data:
            values[name] = _value(hints[name], data[name], at)
        elif _is_required(field):
            raise place.refuse(
                f"key {at.key!r} is missing; {cls.__name__} needs it as {_type_name(hints[name])}"
            )
    try:
        return cls(**values)
    except ValueError as error:
        raise place.refuse(str(error)) from error


def plain_from(value: object) -> object:
    """The same content as dicts, lists, strings and numbers, ready for YAML."""
    if is_dataclass(value):
        return {field.name: plain_from(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, dict):
        items = typing.cast(dict[str, object], value)
        return {key: plain_from(item) for key, item in items.items()}
    if isinstance(value, list):
        return [plain_from(item) for item in typing.cast(list[object], value)]
    return value


def _value(hint: Any, value: object, at: Place) -> object:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        inner = next(argument for argument in arguments if argument is not type(None))
        return None if value is None else _value(inner, value, at)
    if origin is list and isinstance(value, list):
        items = typing.cast(list[object], value)
        return [_value(arguments[0], item, at.child(str(i))) for i, item in enumerate(items)]
    if isinstance(value, dict) and (origin is dict or is_dataclass(hint)):
        entries = typing.cast(dict[str, object], value)
        if origin is dict:
            return {str(k): _value(arguments[1], v, at.child(str(k))) for k, v in entries.items()}
        return record_from(typing.cast(type[object], hint), entries, at)
    return _scalar(hint, typing.cast(object, value), at)


def _scalar(hint: Any, value: object, at: Place) -> object:
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _member(hint, value, at)
    return _primitive(hint, value, at)


def _member(enum: type[Enum], value: object, at: Place) -> Enum:
    if isinstance(value, str) and value in enum.__members__:
        return enum[value]
    raise at.refuse(f"key {at.key!r} has {value!r}; use one of {', '.join(enum.__members__)}")


def _primitive(hint: Any, value: object, at: Place) -> object:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and is_number:
        return float(typing.cast(float, value))
    # Only `type(...) is` keeps True out of the integers.
    if hint in (int, str, bool) and type(value) is hint:
        return value
    raise at.refuse(f"key {at.key!r} has {value!r}; it must be {_type_name(hint)}")


def _type_name(hint: Any) -> str:
    names = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}
    if hint in names:
        return names[hint]
    if is_dataclass(hint):
        return f"a block of {typing.cast(type[object], hint).__name__} keys"
    return str(hint)


def _is_required(field: "Field[Any]") -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _unknown_key(cls: type[object], key: str, known: list[str], place: Place) -> str:
    spelt = place.child(str(key)).key
    return f"key {spelt!r} is not in {cls.__name__}; {alternatives(key, known, 'it has')}"
