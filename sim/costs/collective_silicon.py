# pyright: basic
"""Reads the collectives that the package aiconfigurator-core brings: NCCL and engines' all-reduces.

Its `message_size` counts elements and its latency is in milliseconds; a size is what nccl-tests
calls so, the larger of one rank's input and output (an all-gather's is the gathered vector).
pyarrow comes without complete types.
"""

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sim.costs.collective_csv import OPERATIONS
from sim.costs.collective_tables import Measured

ELEMENT_BYTES = {"half": 2, "bfloat16": 2, "int8": 1}
SYSTEMS = {
    "a100_80g": "a100_sxm",
    "h200": "h200_sxm",
    "rtx_pro_6000": "rtx_pro_6000_server",
}
"""Our GPU -> aiconfigurator's, where the names differ."""


def silicon_folder() -> Path:
    """Where aiconfigurator-core keeps its tables; its code is not imported.

    Raises:
        ValueError: it is not installed.
    """
    spec = find_spec("aiconfigurator_core")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "tables of measured GPUs need the package aiconfigurator-core; "
            "install it: pip install 'diptych[silicon]'"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "systems" / "data"


def silicon_gpus() -> list[str]:
    """The GPUs that aiconfigurator-core has tables of NCCL for, by our names."""
    ours = {theirs: name for name, theirs in SYSTEMS.items()}
    files = silicon_folder().glob("*/comm/*/*/nccl_perf.parquet")
    return sorted({ours.get(path.parts[-5], path.parts[-5]) for path in files})


def comm_files(gpu: str, pattern: str) -> list[Path]:
    """Files of communication tables of a GPU.

    Raises:
        ValueError: nothing was measured on the GPU; the message lists on which something was.
    """
    folder = silicon_folder() / SYSTEMS.get(gpu, gpu) / "comm"
    if not folder.is_dir():
        known = ", ".join(silicon_gpus())
        raise ValueError(f"no collectives were measured on gpu={gpu!r}; there are: {known}")
    return sorted(folder.glob(pattern))


def parquet_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a Parquet file."""
    from pyarrow import parquet  # a simulation without tables does not wait for it

    return parquet.ParquetFile(file).read().to_pylist()


def read_silicon(
    gpu: str, library: str = "nccl", version: str | None = None
) -> tuple[list[Measured], str]:
    """The rows of one library on one GPU, and the library's version.

    A row belongs to the framework and version that it names itself, whatever folder it lies in:
    some folders hold copies of another's rows. Only rows that name none take the folder's. Repeated
    measurements of one point are all returned; `CollectiveTable` takes their median.

    Args:
        gpu: our name, or aiconfigurator's.
        library: `nccl`, or an engine's own all-reduce under CUDA graphs: `vllm`, `sglang`,
            `trtllm`.
        version: of the library; None: the newest.

    Raises:
        ValueError: there is no such GPU, library or version; the message lists what there is.
    """
    name = "nccl_perf" if library == "nccl" else "custom_allreduce_perf"
    by_version: dict[str, list[Measured]] = {}
    libraries = {"nccl"}
    for file in comm_files(gpu, f"*/*/{name}.parquet"):
        for stamp, number, row in _rows(file):
            libraries.add(stamp)
            if stamp == library:
                by_version.setdefault(number, []).append(row)
    if not by_version:
        known = ", ".join(sorted(libraries))
        raise ValueError(f"no library={library!r} was measured on {gpu}; there are: {known}")
    chosen = version or max(by_version, key=release)
    if chosen not in by_version:
        known = ", ".join(sorted(by_version, key=release))
        raise ValueError(f"{library} {chosen} was not measured on {gpu}; there are: {known}")
    return by_version[chosen], chosen


def release(version: str) -> tuple[int, ...]:
    """Versions as numbers, so that 2.9 comes before 2.29 and 1.3.0rc10 before 1.3.0rc20."""
    return tuple(int(digits) for digits in re.findall(r"\d+", version.partition("+")[0]))


def _rows(file: Path) -> Iterator[tuple[str, str, Measured]]:
    """Rows of one file, each with the library and version that measured it."""
    for cells in parquet_rows(file):
        version = str(cells.get("version") or file.parts[-2])
        if file.stem == "nccl_perf":
            library, dtype = "nccl", str(cells["nccl_dtype"])
        else:
            library = str(cells.get("framework") or file.parts[-3]).lower()
            dtype = str(cells["allreduce_dtype"])
            if str(cells.get("backend", "")).endswith("eager"):
                continue
        payload = float(cells["message_size"] * ELEMENT_BYTES[dtype])
        where = (OPERATIONS[str(cells["op_name"])], dtype, int(cells["num_gpus"]), 1)
        yield library, version, Measured(*where, payload, float(cells["latency"]) * 1e-3)
