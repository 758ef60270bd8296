"""Checkpoints as Hugging Face folders: config.json beside safetensors. Nothing is unpickled."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from backends.model_tensors import Single, expected_shapes, published_singles
from sim.models.architecture import Architecture, load_architecture

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe")
"""The families whose layer `Transformer` computes, dense and with experts."""
INVERSE_FREQUENCIES = "model.rotary_emb.inv_freq"
"""Name under which rotary frequencies float32 [head_dim / 2] travel with the weights."""

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What weights are stored in when each number stands for itself; narrower ones go with scales."""
_DEQUANTISE = "give the model's unquantised checkpoint, or dequantise it and save_pretrained again"


def read_config(folder: Path) -> dict[str, object]:
    """The values of `folder`/config.json.

    Raises:
        ValueError: there is none, it is not one JSON object, or its weights are quantised.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json; give a folder that save_pretrained wrote")
    config = _read_json(path)
    quantised = config.get("quantization_config")
    if quantised is not None:
        raise ValueError(
            f"{path}: quantization_config={json.dumps(quantised)} says that the weights need "
            f"scales, which are not applied here; {_DEQUANTISE}"
        )
    return config


def runnable_architecture(config: Mapping[str, object], source: str) -> Architecture:
    """The architecture of a config.json, when it is one that `Transformer` computes.

    Raises:
        ValueError: another family, another activation, or a value that is impossible.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"{source}: model_type={family!r} is not run here; families are {', '.join(FAMILIES)}"
        )
    architecture = load_architecture(config)
    if architecture.activation != "silu":
        raise ValueError(
            f"{source}: hidden_act={architecture.activation!r} must be 'silu', as in all of "
            f"{', '.join(FAMILIES)}"
        )
    return architecture


def inverse_frequencies(config: Mapping[str, object], architecture: Architecture) -> Tensor:
    """Rotary frequencies float32 [head_dim / 2]: the plain ones, or those that llama3 stretched.

    Raises:
        ValueError: the configuration scales or cuts them in another way.
    """
    section = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = cast("dict[str, object]", section)
    kind = rope.get("rope_type", rope.get("type", "default"))
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if kind not in ("default", "llama3") or share not in (None, 1, 1.0):
        raise ValueError(
            f"rope_type={kind!r} with partial_rotary_factor={share} is not computed here; "
            "rope_type may be 'default' or 'llama3', over whole heads"
        )
    half = torch.arange(0, architecture.head_dim, 2, dtype=torch.int64).float()
    plain = 1.0 / (architecture.rope_theta or 1e4) ** (half / architecture.head_dim)
    return plain if kind == "default" else _stretch_llama3(plain, rope)


def _stretch_llama3(plain: Tensor, rope: Mapping[str, object]) -> Tensor:
    """Long waves are stretched by `factor`, short ones kept, those between them mixed."""
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [key for key in keys if not isinstance(rope.get(key), int | float)]
    if missing:
        raise ValueError(f"rope_type='llama3' needs the numbers {', '.join(missing)}; add them")
    factor, low, high, old = (float(cast("float", rope[key])) for key in keys)
    turns = old * plain / (2 * math.pi)
    mix = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - mix) * plain / factor + mix * plain


def read_weights(folder: Path, architecture: Architecture) -> dict[str, Tensor]:
    """The tensors that `architecture` needs, out of one safetensors file or of its shards.

    Raises:
        ValueError: no safetensors there, a file that cannot be read, a tensor that is missing, has
            another shape than the configuration says, or is not floating point.
    """
    expected, singles = expected_shapes(architecture), published_singles(architecture)
    pieces = {one.name for experts in singles.values() for parts in experts for one in parts}
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        found = _load_file(path)
        wanted = (name for name in found if name in expected or name in pieces)
        _require_floats(path, {name: found[name] for name in wanted})
        tensors |= found
    weights: dict[str, Tensor] = {}
    for name, shape in expected.items():
        if name not in tensors and name in singles:
            weights[name] = _joined(folder, tensors, singles[name]).view(shape)
        else:
            weights[name] = _take(folder, tensors, Single(name, shape))
    return weights


def _take(folder: Path, tensors: dict[str, Tensor], one: Single) -> Tensor:
    """A tensor that is there and has the shape that it must have; no longer there afterwards."""
    if one.name not in tensors:
        raise ValueError(f"{folder}: tensor {one.name} is missing; its config.json asks for it")
    tensor = tensors.pop(one.name)
    if tuple(tensor.shape) != one.shape:
        raise ValueError(
            f"{folder}: {one.name} has shape {list(tensor.shape)}, but config.json asks "
            f"for {list(one.shape)}; the two files do not belong together"
        )
    return tensor


def _joined(folder: Path, tensors: dict[str, Tensor], experts: list[list[Single]]) -> Tensor:
    """The tensor that lies in pieces; they are let go, so that they are not kept twice."""
    pieces = [[_take(folder, tensors, one) for one in parts] for parts in experts]
    return torch.stack([parts[0] if len(parts) == 1 else torch.cat(parts) for parts in pieces])


def _load_file(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: cannot be read as safetensors ({error}); it may be cut short, "
            "so fetch or convert it again"
        ) from error


def _require_floats(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # Before shapes are looked at: packed integers have another one, which would mislead.
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS:
            kinds = ", ".join(str(dtype) for dtype in _FLOATS)
            raise ValueError(
                f"{path}: {name} has dtype {tensor.dtype}, and weights must be one of {kinds}; "
                f"{_DEQUANTISE}"
            )


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    index = folder / _INDEX
    if index.is_file():
        places = _read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise ValueError(f"{index}: weight_map must name the file of each tensor")
        files = [folder / name for name in sorted({str(name) for name in places.values()})]
        absent = [path.name for path in files if not path.is_file()]
        if absent:
            raise ValueError(f"{index} names {', '.join(absent)}, not in {folder}; add what lacks")
        return files
    pickled = sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt*")))
    if pickled:
        raise ValueError(
            f"{folder} holds {', '.join(pickled)}, which could run code when unpickled; load it "
            "where you trust it and write it again with save_pretrained (safetensors)"
        )
    raise ValueError(f"{folder} has neither {_SINGLE} nor {_INDEX}; add the weights")


def _read_json(path: Path) -> dict[str, object]:
    try:
        values: object = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); it may be cut short") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold one JSON object, not a {type(values).__name__}")
    return cast("dict[str, object]", values)
