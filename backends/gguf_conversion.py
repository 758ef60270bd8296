"""A GGUF file of the llama family, converted once to a Hugging Face folder in a cache directory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

if TYPE_CHECKING:
    from gguf import GGUFReader

Progress = Callable[[str], None]
"""Is told what goes on, in a few words, whenever that changes."""

DEFAULT_CACHE = Path("~/.cache/diptych/models")
_FORMAT = b"diptych-2"  # part of the hash, so that a change of this file converts again
_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3


def converted_folder(gguf: Path, cache: Path | None, progress: Progress) -> Path:
    """The folder that `gguf` converts to, converted now if it never was.

    The folder appears whole: it is written under a temporary name and renamed. Of two processes
    that convert at once the second to finish takes the folder of the first.

    Args:
        gguf: the file to read.
        cache: where converted folders lie; None for `DEFAULT_CACHE`.
        progress: told of each step of a conversion; not called when there is nothing to do.

    Raises:
        ValueError: the file is not GGUF, or of an architecture or tokenizer other than llama's, or
            has experts, biases or scaled rotary positions.
    """
    root = (cache or DEFAULT_CACHE).expanduser()
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(_FORMAT)
    target = root / f"{gguf.stem}-{digest.hexdigest()[:12]}"
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=root))
    try:
        _convert(gguf, draft, progress)
        try:
            os.rename(draft, target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _convert(gguf: Path, folder: Path, progress: Progress) -> None:
    from gguf import GGUFReader  # an optional dependency, slow to import

    progress(f"reading {gguf.name}")
    try:
        reader = GGUFReader(gguf)
    except (ValueError, IndexError, OSError) as error:
        raise ValueError(f"{gguf}: cannot be read as GGUF ({error}); fetch it again") from error
    config = _config(reader, gguf)
    _refuse_other_layers(reader, gguf)
    _refuse_rope_scaling(reader, gguf)
    progress(f"dequantising {len(reader.tensors)} tensors")
    weights = _weights(reader, config)
    progress("writing the tokenizer and the weights")
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    _tokenizer(reader, gguf).save(str(folder / "tokenizer.json"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _value(reader: GGUFReader, key: str) -> Any:
    field = reader.fields.get(key)
    return None if field is None else field.contents()


def _refuse_other_layers(reader: GGUFReader, gguf: Path) -> None:
    """Mixtral too calls itself `llama`; only its tensors tell."""
    for tensor in reader.tensors:
        block, *place = tensor.name.split(".")
        dense = len(place) == 3 and place[1] in _TENSORS and place[2] == "weight"
        if block == "blk" and not dense:
            raise ValueError(
                f"{gguf}: tensor {tensor.name} is in no dense llama layer, which has the weights "
                f"{', '.join(_TENSORS)}; experts and biases are not converted here, so give a "
                "GGUF of a dense model"
            )


def _refuse_rope_scaling(reader: GGUFReader, gguf: Path) -> None:
    """Stretched rotary positions, of which the converted configuration would say nothing."""
    found = {key: _value(reader, f"llama.rope.scaling.{key}") for key in ("type", "factor")}
    found["scale_linear"] = _value(reader, "llama.rope.scale_linear")  # how old files say it
    kind = found.pop("type")
    stretched = [key for key, factor in found.items() if factor not in (None, 0.0, 1.0)]
    if kind not in (None, "none", "linear") or stretched:
        raise ValueError(
            f"{gguf}: rope scaling of type {kind!r} by {found} must be absent, 'none' or by 1.0; "
            "give a Hugging Face folder of the model"
        )
    for tensor in reader.tensors:  # factors of single frequencies, as llama 3.1 has them
        if tensor.name.startswith("rope_") and (tensor.data != 1).any():
            raise ValueError(
                f"{gguf}: {tensor.name} scales rotary frequencies and must hold ones alone; "
                "give a Hugging Face folder of the model"
            )


def _config(reader: GGUFReader, gguf: Path) -> dict[str, object]:
    family = _value(reader, "general.architecture")
    if family != "llama":
        raise ValueError(
            f"{gguf}: architecture {family!r} is not converted here, only 'llama'; convert it to "
            "a Hugging Face folder with safetensors and give that"
        )
    heads = _value(reader, "llama.attention.head_count")
    names = {tensor.name for tensor in reader.tensors}
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": _value(reader, "llama.embedding_length"),
        "intermediate_size": _value(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _value(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _value(reader, "llama.attention.head_count_kv") or heads,
        "max_position_embeddings": _value(reader, "llama.context_length"),
        "rms_norm_eps": _value(reader, "llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": _value(reader, "llama.rope.freq_base") or 10000.0,
        "vocab_size": len(_value(reader, "tokenizer.ggml.tokens")),
        "tie_word_embeddings": "output.weight" not in names,
        "bos_token_id": _value(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _value(reader, "tokenizer.ggml.eos_token_id"),
        "dtype": "float32",
    }


def _weights(reader: GGUFReader, config: dict[str, Any]) -> dict[str, Tensor]:
    from gguf import dequantize

    top = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        if tensor.name in top:
            weights[top[tensor.name]] = values
            continue
        if not tensor.name.startswith("blk."):
            continue  # tables of rotary positions, which are plain
        _, layer, part, kind = tensor.name.split(".")
        if part in heads:
            values = _halves(values, heads[part])
        weights[f"model.layers.{layer}.{_TENSORS[part]}.{kind}"] = values
    return weights


def _halves(values: Tensor, num_heads: int) -> Tensor:
    """Rows of GGUF rotate in neighbouring pairs; Hugging Face pairs the halves of a head."""
    pairs = values.view(num_heads, -1, 2, *values.shape[1:])
    return pairs.transpose(1, 2).reshape(values.shape).contiguous()


def _tokenizer(reader: GGUFReader, gguf: Path) -> Tokenizer:
    kind, splitter = (_value(reader, f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind != "gpt2" or splitter not in ("smollm", "gpt-2", None):
        raise ValueError(
            f"{gguf}: tokenizer {kind!r} with splitter {splitter!r} is not converted here, only "
            "'gpt2' with 'smollm' or 'gpt-2'; give a Hugging Face folder with a tokenizer.json"
        )
    tokens: list[str] = _value(reader, "tokenizer.ggml.tokens")
    kinds: list[int] = _value(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in _value(reader, "tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer: Any = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    pieces: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if splitter == "smollm":
        pieces.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        AddedToken(token, special=True, normalized=False)
        for token, token_kind in zip(tokens, kinds, strict=True)
        if token_kind == _CONTROL_TOKEN
    ]
    tokenizer.add_special_tokens(special)
    return tokenizer
