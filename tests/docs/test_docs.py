"""What the pages say to type works: their Python runs, and so do their `diptych` commands.

Blocks of a page share a folder and a namespace. A block whose fence says `title="PATH"` is written
to that file. Commands run at toy size: see `TOY`.
"""

import doctest
import re

import pytest
from pages import PAGES, ROOT, Block, blocks, commands

from scenarios.cli import COMMANDS, main

TOY = {
    "run": ["workload.num_requests=24", "seeds=[0]"],
    "search": ["workload.num_requests=24", "seeds=[0]", "search.num_trials=4"],
    "validate": ["only=[decisions]", "decision_requests=12"],
    "calibrate": ["weights=random", "repeats=1"],
}
"""Added to the commands of the pages, so that they take a moment and need no weights."""
ONE_RULE = ["policy/batching=continuous", "policy/cache_eviction=pgdsf"]
"""Of those that a study's validation would take one after another, where the page names none."""
SERVING = ["workload.duration_s=5", "seeds=[0]"]
"""The same for the study whose load ends after a time."""
STAND_IN = {"model=smollm2_135m": "model=tiny_llama"}
"""What `calibrate weights=random` measures instead."""
HARMLESS = {"cd", "export", "git", "mkdir", "ls", "cat", "source"}
PROGRAMS = {"pip", "python", "python3", "pytest", "jupyter", "ruff", "pyright", "pre-commit"}
"""Not run: the files that they name must exist."""
PATH = re.compile(r"[\w./-]+/[\w./-]*|[\w-]+\.(?:py|ipynb|md|toml|yaml)")


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """One home for all pages, so that the machine is calibrated once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def reader(tmp_path, home, monkeypatch):
    """Someone who has just installed Diptych."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.delenv("DIPTYCH_PATH", raising=False)
    return Reader(tmp_path, home, monkeypatch)


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_says_to_type_works(page, reader):
    for block in blocks(page):
        reader.follow(block, f"{page}:{block.line}")


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_to_files(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)[^)\s]*\)", text)
    local = [target for target in targets if "://" not in target]
    assert [one for one in local if not ((ROOT / page).parent / one).exists()] == []


class Reader:
    """Does what a page says, in a folder of its own."""

    def __init__(self, folder, home, monkeypatch):
        self.folder, self.home, self.monkeypatch = folder, home, monkeypatch
        self.names = {"__name__": "page"}

    def follow(self, block: Block, place: str) -> None:
        if block.title:
            path = self.folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
            if path.suffix == ".py":
                compile(block.text, place, "exec")
        elif block.language == "python":
            text = block.text
            code = doctest.script_from_examples(text) if text.startswith(">>>") else text
            exec(compile(code, place, "exec"), self.names)
        elif block.language in ("bash", "sh", "shell", "console"):
            for words in commands(block.text):
                self.type(words, place)

    def type(self, words: list[str], place: str) -> None:
        with self.monkeypatch.context() as patch:
            while words and re.match(r"[A-Z_]+=", words[0]):
                name, _, value = words.pop(0).partition("=")
                patch.setenv(name, value)
            if not words:
                return
            program = words[0].rpartition("/")[2]
            if program == "diptych":
                self.run(words[1:], place)
            elif program == "make":
                check_make(words[1:], place)
            elif program in PROGRAMS:
                check_files(words[1:], place)
            else:
                assert program in HARMLESS, f"{place}: {program} is in no list of programs"
                self.export(words)

    def export(self, words: list[str]) -> None:
        if words[0] == "export":
            name, _, value = words[1].partition("=")
            self.monkeypatch.setenv(name, value)

    def run(self, words: list[str], place: str) -> None:
        command = words[0] if words else "--help"
        assert command in (*COMMANDS, "--help", "-h"), f"{place}: there is no `diptych {command}`"
        done = self.home / "_".join(words).replace("/", "-")
        calibrated = command == "calibrate" and done.exists()
        if calibrated or {"<", ">"} & set(words):  # a placeholder such as <folder>
            return
        sized = any(word in ("-cn", "--config-name") for word in words) or command == "calibrate"
        if "cost=fitted" in words:
            words = [STAND_IN.get(word, word) for word in words]
        toy = toy_size(command, words) if sized and not asks_hydra(words) else []
        if command == "validate":
            toy = [*toy, *rules_that_are_not_named(words)]
        code = main([*words, *toy])
        expected = 1 if any(word.startswith("corrupt=") for word in words) else 0
        assert code == expected, f"{place}: `diptych {' '.join(words)}` ended with {code}"
        if command == "calibrate":
            done.touch()


def toy_size(command: str, words: list[str]) -> list[str]:
    if "serving" not in words:
        return TOY.get(command, [])
    staged = any(word.startswith("workload.stages") for word in words)
    return [] if staged else SERVING


def rules_that_are_not_named(words: list[str]) -> list[str]:
    return [
        rule for rule in ONE_RULE
        if not any(word.startswith(rule.partition("=")[0]) for word in words)
    ]  # fmt: skip


def asks_hydra(words: list[str]) -> bool:
    return any(word.startswith(("--cfg", "--help", "-h", "--info")) for word in words)


def check_make(targets: list[str], place: str) -> None:
    rules = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in targets:
        found = "=" in target or re.search(rf"^{re.escape(target)}:", rules, re.MULTILINE)
        assert found, f"{place}: the Makefile has no target {target}"


def check_files(arguments: list[str], place: str) -> None:
    for argument in arguments:
        name = argument.partition("::")[0]
        if not argument.startswith(("-", ".")) and "://" not in name and PATH.fullmatch(name):
            assert (ROOT / name).exists(), f"{place}: {name} does not exist"
