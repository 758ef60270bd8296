"""Reads published traces line by line. Whatever is wrong is named by file and line."""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

COLUMN_ALIASES: dict[str, tuple[str, ...]] = {
    "arrival": ("TIMESTAMP", "Timestamp", "timestamp"),
    "prompt_tokens": ("ContextTokens", "Request tokens", "input_length", "num_prefill_tokens"),
    "output_tokens": (
        "GeneratedTokens", "Response tokens", "output_length", "num_decode_tokens", "output_tokens",
    ),
    "prefix_hashes": ("hash_ids",),
    "arrival_s": ("arrival_s",),
    "question_tokens": ("question_tokens",),
    "stages": ("stages",),
    "document_tokens": ("document_tokens",),
    "system_tokens": ("system_tokens",),
}  # fmt: skip
"""What published traces, and those that we write, call our columns."""

MAX_TICKS = 10**15
"""Times beyond it (30,000 years of milliseconds) are mistakes, and floats there lose digits."""

MAX_TRACE_TOKENS = 2**31 - 1
"""A longer prompt or answer in a file is a mistake."""


def broken(path: str, line: int, problem: str, way_out: str) -> ValueError:
    """The error of one line: where, what is wrong with it, and what to do."""
    return ValueError(f"{path}:{line}: {problem}; {way_out}")


def read_lines(path: str) -> Iterator[tuple[int, str]]:
    """Numbered lines of a text file, plain or `.gz`, without line ends and byte order mark.

    Raises:
        ValueError: the file is missing, empty, cut off, not UTF-8, or has a blank line inside.
    """
    number = 0
    blank: int | None = None
    try:
        with _open(path) as file:
            for number, raw in enumerate(file, 1):
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if not text.strip():
                    blank = blank or number
                    continue
                if blank is not None:
                    raise broken(path, blank, "the line is blank", "remove it")
                yield number, text
    except UnicodeDecodeError as error:
        problem = f"{error.object[error.start : error.start + 4]!r} is not UTF-8"
        raise broken(path, number, problem, "convert the file to UTF-8") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        problem = f"the compressed data must be whole but is not ({error})"
        raise broken(path, number + 1, problem, "fetch the file again") from error
    except OSError as error:
        raise ValueError(
            f"path={path} must be a readable file but is not ({error.strerror}); correct the path"
        ) from error
    if number == 0 or blank == 1:
        raise broken(path, 1, "the file has no lines and must have some", "fetch the file again")


def _open(path: str) -> BinaryIO:
    full = Path(path).expanduser()
    return cast(BinaryIO, gzip.open(full)) if full.suffix == ".gz" else full.open("rb")


def csv_rows(path: str, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Numbered rows of a CSV file with a header: the asked columns, by our names, in that order.

    Raises:
        ValueError: a column is missing, or a row has more or fewer fields than the header.
    """
    lines = read_lines(path)
    number, header_line = next(lines)
    header = [name.strip() for name in _fields(path, number, header_line)]
    places = [header.index(name) for name in _names_in(path, number, header, columns)]
    for number, line in lines:
        fields = _fields(path, number, line)
        if len(fields) != len(header):
            problem = f"{line!r} has {len(fields)} fields and the header {len(header)}"
            raise broken(path, number, problem, "complete or remove the line")
        yield number, [fields[place] for place in places]


def json_rows(path: str, columns: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
    """Numbered records of a JSON Lines file: the asked fields, by our names, in that order.

    Raises:
        ValueError: a line is not a JSON object, or lacks a field.
    """
    for number, line in read_lines(path):
        yield number, json_fields(path, number, line, columns)


def json_fields(path: str, number: int, line: str, columns: Sequence[str]) -> list[Any]:
    """The asked fields of one line, by our names, in that order.

    Raises:
        ValueError: the line is not a JSON object, or lacks a field.
    """
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        problem = f"{line[-40:]!r} does not end a JSON object ({error})"
        raise broken(path, number, problem, "complete or remove the line") from error
    except RecursionError as error:
        problem = f"{line[:40]!r} is nested too deeply and must be a flat JSON object"
        raise broken(path, number, problem, "correct or remove the line") from error
    if not isinstance(record, dict):
        problem = f"{line[:40]!r} must be a JSON object"
        raise broken(path, number, problem, "complete or remove the line")
    found = cast(dict[str, Any], record)
    return [found[name] for name in _names_in(path, number, found, columns)]


def json_time(path: str, line: int, column: str, value: object, unit: str) -> float:
    """A time of a JSON Lines file, as the number that it is there.

    Raises:
        ValueError: it is no number, or beyond `MAX_TICKS`.
    """
    time = cast(float, value)
    if type(value) not in (int, float) or not abs(time) <= MAX_TICKS:
        problem = f"{column}={value!r} must be a number of {unit} up to {MAX_TICKS}"
        raise broken(path, line, problem, "correct or remove the line")
    return time


def token_count(path: str, line: int, column: str, value: object, least: int = 1) -> int:
    """A length in tokens as a whole number.

    Raises:
        ValueError: it is no whole number, or below `least`.
    """
    # `int` alone would also take 1_000.
    digits = isinstance(value, str) and value.strip().isdecimal() and len(value) <= 12
    count = int(cast(str, value)) if digits else value
    # bool is an int to Python, but `true` is no length.
    if type(count) is not int or not least <= count <= MAX_TRACE_TOKENS:
        problem = f"{column}={value!r} must be a whole number from {least} to {MAX_TRACE_TOKENS}"
        raise broken(path, line, problem, "correct or remove the line")
    return count


def _fields(path: str, number: int, line: str) -> list[str]:
    try:
        return next(csv.reader((line,), strict=True))
    except csv.Error as error:
        problem = f"{line!r} is not CSV ({error})"
        raise broken(path, number, problem, "complete or remove the line") from error


def _names_in(
    path: str, number: int, present: Sequence[str] | dict[str, Any], columns: Sequence[str]
) -> list[str]:
    """What this file calls each of our columns."""
    names: list[str] = []
    for column in columns:
        # A header may also say one name twice; a mapping has kept the last, as JSON does.
        found = [name for name in present if name in COLUMN_ALIASES[column]]
        if len(found) != 1:
            state = f"has {column} {len(found)} times, as {found}" if found else f"lacks {column}"
            problem = f"{list(present)} {state} and must have it once"
            way_out = f"name one column {' or '.join(map(repr, COLUMN_ALIASES[column]))}"
            raise broken(path, number, problem, way_out)
        names.append(found[0])
    return names
