"""Typed access to the values of a config.json, so that a bad one is named and not passed on."""

from collections.abc import Mapping
from typing import cast


class ConfigFile:
    """The values of one config.json, or of a section of it. A null counts as absent.

    Every method raises ValueError for a value of the wrong type; those without a default also for
    a missing one.
    """

    def __init__(self, values: Mapping[str, object], section: str = "") -> None:
        self._values = values
        self._section = section

    def has(self, key: str) -> bool:
        """Whether `key` is written there, be it as null."""
        return key in self._values

    def section(self, key: str) -> "ConfigFile":
        """The nested object under `key`; an empty one where it is absent."""
        value = self._values.get(key)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        return ConfigFile(cast("dict[str, object]", value), f"{self._section}{key}.")

    def integer(self, *keys: str) -> int:
        """The whole number under the first of `keys` (synonyms) that is there."""
        value = self.integer_or(None, *keys)
        if value is None:
            raise ValueError(
                f"{self._section}{keys[0]} is missing; a config.json of this family must give it"
            )
        return value

    def integer_or(self, default: int | None, *keys: str) -> int | None:
        """As `integer`, with what to take when none of `keys` is there."""
        for key in keys:
            value = self._values.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise self._wrong(key, value, "a whole number")
            return value
        return default

    def number_or(self, key: str, default: float) -> float:
        """The number under `key`, or `default`."""
        value = self._values.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, value, "a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """The true or false under `key`, or `default`."""
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: str) -> str:
        """The string under `key`, or `default`."""
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        """The list of whole numbers under `key`, empty where it is absent."""
        value = self._values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list):
            raise self._wrong(key, value, "a list")
        items = cast("list[object]", value)
        if not all(isinstance(item, int) for item in items):
            raise self._wrong(key, items, "a list of whole numbers")
        return tuple(cast("list[int]", items))

    def _wrong(self, key: str, value: object, rule: str) -> ValueError:
        return ValueError(f"{self._section}{key}={value!r} must be {rule}")
