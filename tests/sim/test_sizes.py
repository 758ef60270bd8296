"""Files of at most 400 lines, functions of at most 60: what fits in a reader's head."""

import ast

import pytest
from source_tree import EVERYWHERE, name_of, sources, tree

MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION = 400, 60


@pytest.mark.parametrize("folder", EVERYWHERE)
def test_no_file_is_too_long(folder: str) -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in sources(folder)}
    assert [name for name, lines in lengths.items() if lines > MOST_LINES_OF_A_FILE] == []


@pytest.mark.parametrize("folder", EVERYWHERE)
def test_no_function_is_too_long(folder: str) -> None:
    functions = [
        (f"{name_of(path)}: {node.name}", (node.end_lineno or 0) - node.lineno + 1)
        for path in sources(folder)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert [name for name, lines in functions if lines > MOST_LINES_OF_A_FUNCTION] == []
