"""Reads the fenced blocks of our pages, and the commands in them."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
)
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<info>[^`\n]*)\n(?P<text>.*?)^(?P=indent)```\s*$",
    re.DOTALL | re.MULTILINE,
)
TITLE = re.compile(r'title="([^"]+)"')
BETWEEN = {"&&", "||", ";", "|", "&"}


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    title: str
    """Path of the file that the block is the content of, or nothing."""
    text: str
    line: int


def blocks(page: str) -> Iterator[Block]:
    """All fenced blocks of a page, in order."""
    content = (ROOT / page).read_text(encoding="utf-8")
    for found in FENCE.finditer(content):
        language, _, rest = found["info"].strip().partition(" ")
        title = TITLE.search(rest)
        indent = found["indent"]
        text = "".join(line.removeprefix(indent) for line in found["text"].splitlines(True))
        line = content.count("\n", 0, found.start()) + 2
        yield Block(language, title[1] if title else "", text, line)


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command in a bash block; `a && b` are two."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in lexer:
            if word in BETWEEN:
                yield words
                words = []
            else:
                words.append(word)
        if words:
            yield words
