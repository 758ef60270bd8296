"""Reads tables of profiled layers: the CSV folders of LLMServingSim's profiler and of Vidur's.

`dense.csv` beside `attention.csv` in a folder `tpN` is LLMServingSim's (microseconds); `mlp.csv`,
with or without `attention.csv`, is Vidur's and Frontier's (milliseconds). Either may be gzipped.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from sim.costs.layer_tables import LayerTables

Rows = NDArray[np.float64]

ONCE = ("embedding", "final_layernorm")
"""LLMServingSim's layers that a model has once."""
TWICE = ("layernorm",)
"""Those that every layer has twice."""
WORDS = ("layer", "is_prefill")
"""Columns that do not hold numbers."""
PER_LAYER = (
    "input_layernorm", "attn_pre_proj", "attn_rope", "attn_post_proj",
    "post_attention_layernorm", "mlp_up_proj", "mlp_act", "mlp_down_proj", "add",
)  # fmt: skip
"""Vidur's operators of a layer; those that a model lacks are absent or empty."""


def read_tables(folder: Path, tp_size: int) -> LayerTables:
    """The tables of a folder, in whichever format they are.

    Args:
        folder: with the files, or with one folder of them somewhere below.
        tp_size: ranks that share the model; tables of other rank counts are passed over.

    Raises:
        ValueError: there are none, several, or one that cannot be read; the message names it.
    """
    if not folder.is_dir():
        raise ValueError(f"cost_tables={folder} is not a folder; name one with measured layers")
    found = sorted({path.parent for path in folder.rglob("dense.csv*")})
    mine = [one for one in found if one.name == f"tp{tp_size}" or not _is_rank_folder(one)]
    if found and not mine:
        known = ", ".join(sorted(one.name.removeprefix("tp") for one in found))
        raise ValueError(
            f"tp_size={tp_size} was not measured in {folder}; there is tp_size {known}"
        )
    readers: list[tuple[Path, Callable[[Path, int], LayerTables]]] = [
        *((one, _llmservingsim) for one in mine),
        *((path.parent, _vidur) for path in sorted(folder.rglob("mlp.csv*"))),
    ]
    if len(readers) != 1:
        which = ", ".join(str(one) for one, _ in readers) or "none"
        raise ValueError(
            f"cost_tables={folder} must hold the tables of one model (dense.csv of LLMServingSim "
            f"or mlp.csv of Vidur); found: {which}"
        )
    ((place, reader),) = readers
    return reader(place, tp_size)


def _is_rank_folder(folder: Path) -> bool:
    return folder.name.startswith("tp") and folder.name[2:].isdigit()


def _llmservingsim(folder: Path, tp_size: int) -> LayerTables:
    del tp_size
    dense = _csv(folder, "dense", ("layer", "tokens", "time_us"))
    names, tokens = dense["layer"], dense["tokens"].astype(float)
    seconds = dense["time_us"].astype(float) * 1e-6
    layer: dict[float, float] = {}
    once: dict[float, float] = {}
    for name, count, second in zip(names, tokens, seconds, strict=True):
        into = once if name in ONCE else layer
        into[count] = into.get(count, 0.0) + second * (2 if name in TWICE else 1)
    heads = _csv(folder, "per_sequence", ("layer", "sequences", "time_us"))
    sampled: dict[float, float] = {}
    for count, micro in zip(heads["sequences"], heads["time_us"], strict=True):
        sampled[float(count)] = sampled.get(float(count), 0.0) + float(micro) * 1e-6
    axes = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
    attention = _csv(folder, "attention", (*axes, "time_us"))
    rows = np.stack([attention[name].astype(float) for name in (*axes, "time_us")], axis=1)
    rows[:, -1] *= 1e-6
    chunked, decoding = rows[:, 0] > 0, rows[:, 2] > 0
    return LayerTables(
        source=str(folder),
        layer=_pairs(layer),
        once=_pairs(once),
        sampled=_pairs(sampled),
        prompts=_median(rows[chunked & ~decoding][:, [0, 1, 4]]),
        decodes=_median(rows[~chunked & decoding][:, [2, 3, 4]]),
        mixed=_median(rows[chunked & decoding]),
    )


def _vidur(folder: Path, tp_size: int) -> LayerTables:
    mlp = _csv(folder, "mlp", ("num_tokens", "num_tensor_parallel_workers"))
    ranks = mlp["num_tensor_parallel_workers"].astype(int)
    mine = ranks == tp_size
    if not mine.any():
        known = ", ".join(map(str, sorted(set(ranks.tolist()))))
        raise ValueError(
            f"tp_size={tp_size} was not measured in {folder}; there is tp_size {known}"
        )
    tokens = mlp["num_tokens"].astype(float)[mine]
    per_layer = sum(_stat(mlp, name)[mine] * (2 if name == "add" else 1) for name in PER_LAYER)
    once = _stat(mlp, "emb")[mine]
    prompts = decodes = None
    if any(folder.glob("attention.csv*")):
        prompts, decodes = _vidur_attention(folder, tp_size)
    return LayerTables(
        source=str(folder),
        layer=_median(np.column_stack([tokens, per_layer])),
        once=_median(np.column_stack([tokens, once])),
        prompts=prompts,
        decodes=decodes,
    )


def _vidur_attention(folder: Path, tp_size: int) -> tuple[Rows, Rows]:
    axes = ("batch_size", "prefill_chunk_size", "kv_cache_size", "is_prefill")
    columns = _csv(folder, "attention", (*axes, "num_tensor_parallel_workers"))
    mine = columns["num_tensor_parallel_workers"].astype(int) == tp_size
    prefill = columns["is_prefill"].astype(str) == "True"
    batch, tokens, cached = (columns[name].astype(float) for name in axes[:3])
    saving = _stat(columns, "attn_kv_cache_save")
    prompt_s = _stat(columns, "attn_prefill") + saving
    decode_s = _stat(columns, "attn_decode") + saving
    chunks, steps = mine & prefill & (batch == 1) & (tokens > 0), mine & ~prefill & (cached > 0)
    prompts = np.column_stack([tokens, cached, prompt_s])[chunks]
    decodes = np.column_stack([batch, cached, decode_s])[steps]
    return _median(prompts), _median(decodes)


def _stat(columns: dict[str, NDArray[Any]], name: str) -> Rows:
    """Median seconds of an operator; none where it was not measured."""
    values = columns.get(f"time_stats.{name}.median")
    if values is None:
        return np.zeros(len(next(iter(columns.values()))))
    return np.nan_to_num(values.astype(float)) * 1e-3


def _pairs(seconds: dict[float, float]) -> Rows:
    return np.array(sorted(seconds.items()))


def _median(rows: Rows) -> Rows:
    """Each point once, with the median of its measurements."""
    points, where = np.unique(rows[:, :-1], axis=0, return_inverse=True)
    order = np.argsort(where, kind="stable")
    groups = np.split(rows[order, -1], np.cumsum(np.bincount(where))[:-1])
    return np.column_stack([points, [float(np.median(group)) for group in groups]])


def _csv(folder: Path, name: str, needed: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    path = next(iter(sorted(folder.glob(f"{name}.csv*"))), None)
    if path is None:
        raise ValueError(f"{folder} lacks {name}.csv; profile it, or name another folder")
    # Here and not above: a run without tables need not wait for pandas.
    import pandas as pd  # pyright: ignore[reportMissingTypeStubs]

    try:
        frame: Any = pd.read_csv(path)
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise ValueError(f"{path}: cannot be read as CSV ({error}); profile it again") from error
    missing = [column for column in needed if column not in frame]
    if missing:
        raise ValueError(f"{path}: lacks column {', '.join(missing)}; it has {list(frame)[:8]}")
    if frame[list(needed)].isna().to_numpy().any():
        line = int(frame[list(needed)].isna().to_numpy().any(axis=1).argmax()) + 2
        raise ValueError(f"{path}:{line}: a value is missing; measure that point again")
    for column in (one for one in frame if one in needed or one.startswith("time_stats.")):
        if column in WORDS:
            continue
        numbers: Any = cast(Any, pd).to_numeric(frame[column], errors="coerce")
        wrong = (numbers.isna() & frame[column].notna()).to_numpy()
        if wrong.any():
            at = int(wrong.argmax())
            raise ValueError(
                f"{path}:{at + 2}: {column}={frame[column].iloc[at]!r} must be a number; measure "
                "that point again"
            )
    return {column: frame[column].to_numpy() for column in frame}
