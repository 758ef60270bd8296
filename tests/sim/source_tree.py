"""Reads our own packages as syntax trees, for the tests of their shape."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("hardware_models", "sim", "backends", "scenarios")
EVERYWHERE = (*PACKAGES, "tests", "benchmarks")


def sources(*folders: str) -> list[Path]:
    """Python files under folders of the repository, their own roots included."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    """`sim/processes/pace.py` as the path that messages show."""
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, wherever in the file it does so."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = path.relative_to(ROOT).parts[: -node.level]
                base = ".".join((*package, base)).rstrip(".")
            yield base
            # `from sim import metrics` imports sim.metrics.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def importers(folder: str, *forbidden: str) -> list[str]:
    """Files of a folder that import a forbidden module or anything inside it."""
    return [
        f"{name_of(path)} imports {module}"
        for path in sources(folder)
        for module in imports(path)
        if any(module == name or module.startswith(f"{name}.") for name in forbidden)
    ]
