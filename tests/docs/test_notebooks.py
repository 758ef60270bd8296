"""Every notebook runs from top to bottom, at toy size, and keeps its functions short."""

import ast
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
TOY = {
    "what_does_chunked_prefill_buy": {
        "RATES": [8, 20], "SEEDS": [0, 1], "NUM_REQUESTS": 30, "CHUNK_TOKENS": 256,
        "CHUNKS": [256], "BUSY_RATE": 20,
    },
    "what_do_micro_batches_hide": {
        "NUM_LAYERS": 6, "SHARES": [0.1, 0.6], "MODELS": ["mixtral_8x22b"],
        "ATTENTION_NODES": [1, 2], "SKEWS": [1.0], "NUM_REQUESTS": 60,
    },
    "what_does_elasticity_buy": {
        "NUM_REQUESTS": 40, "WATCHED": 20, "ALPHA": "1_4", "BUSY_RATE": 4.0, "RATES": [2.0, 6.0],
        "SYSTEMS": ["elastic_sp", "static_sp"],
    },
    "what_does_a_knowledge_cache_save": {
        "HOST_GIB": [8, 16], "RATES": [0.4, 0.8], "SEEDS": [0], "NUM_REQUESTS": 150,
        "BUSY_RATE": 0.8,
    },
}  # fmt: skip
"""What takes the place of the cell with the tag `parameters`."""
MOST_LINES_OF_A_FUNCTION = 5
MOST_BYTES = 600_000

EVERY_NOTEBOOK = pytest.mark.parametrize("name", NOTEBOOKS)


def path_of(name: str) -> Path:
    return ROOT / "notebooks" / f"{name}.ipynb"


def code_cells(name: str) -> list[dict]:
    cells = json.loads(path_of(name).read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def source(cell: dict) -> str:
    text = "".join(cell["source"])
    return "\n".join(line for line in text.splitlines() if not line.startswith(("%", "!")))


def assigned(text: str) -> set[str]:
    """Names that the top level of a cell gives a value."""
    targets = [node.targets for node in ast.parse(text).body if isinstance(node, ast.Assign)]
    return {name.id for group in targets for name in group if isinstance(name, ast.Name)}


@EVERY_NOTEBOOK
def test_no_function_of_a_notebook_is_longer_than_five_lines(name: str) -> None:
    functions = [
        (node.name, (node.end_lineno or 0) - node.lineno + 1)
        for cell in code_cells(name)
        for node in ast.walk(ast.parse(source(cell)))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert [one for one in functions if one[1] > MOST_LINES_OF_A_FUNCTION] == []


@EVERY_NOTEBOOK
def test_a_notebook_is_kept_with_its_outputs_and_small(name: str) -> None:
    cells = code_cells(name)
    assert all(cell["execution_count"] for cell in cells), "run all cells before saving"
    kinds = {kind for cell in cells for out in cell["outputs"] for kind in out.get("data", {})}
    assert "image/png" in kinds
    assert not any(out["output_type"] == "error" for cell in cells for out in cell["outputs"])
    assert path_of(name).stat().st_size < MOST_BYTES


@EVERY_NOTEBOOK
def test_a_notebook_runs_at_toy_size(name: str, tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    assert name in TOY, f"give {name} small parameters in TOY"
    notebook = nbformat.read(path_of(name), 4)
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    assert len(tagged) == 1, "one cell, tagged `parameters`, holds all sizes"
    assert assigned(tagged[0].source) == set(TOY[name])
    tagged[0].source = "\n".join(f"{key} = {value!r}" for key, value in TOY[name].items())
    folder = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(
        notebook, kernel_name="python3", timeout=120, resources=folder
    ).execute()
