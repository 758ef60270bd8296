import json
import subprocess
import sys
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from model_cases import reference_logits, reference_model, run
from safetensors.torch import load_file, save_file

from backends.forward_batch import Chunk
from backends.gguf_conversion import converted_folder
from backends.kv_cache import PagedKVCache
from backends.tokenizer import Tokenizer
from backends.transformer import Transformer
from backends.weights import TINY_CONFIG, load_model, random_model


@pytest.fixture
def folder(tmp_path):
    reference_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_shards_hold_the_same_weights(folder, tmp_path):
    reference_model("llama").save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    whole, sharded = (load_model(path).weights for path in (folder, tmp_path / "sharded"))
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)


def test_loading_imports_neither_transformers_nor_gguf(folder):
    code = (
        "import sys; from backends.weights import load_model; load_model(sys.argv[1]);"
        "sys.exit(any(name in sys.modules for name in ('transformers', 'gguf')))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(folder)], check=False).returncode == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "families are llama, mistral, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' must be 'silu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type='yarn'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "needs the numbers factor"),
        ({"intermediate_size": 97}, "has shape"),
        ({"num_hidden_layers": 3}, r"model.layers.2.*is missing"),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            r'config\.json: quantization_config=\{"quant_method": "fp8"\}.*dequantise',
        ),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(folder, change, message):
    change_config(folder, **change)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_no_quantisation_may_be_said_as_null(folder):
    change_config(folder, quantization_config=None)
    load_model(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool])
def test_weights_that_need_scales_are_refused(folder, dtype):
    path, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(path)
    save_file(tensors | {name: tensors[name].to(dtype)}, path)
    with pytest.raises(ValueError, match=rf"model\.safetensors: {name} has dtype {dtype}.*deq"):
        load_model(folder)


def test_tensors_that_no_layer_needs_may_be_integers(folder):
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"position_ids": torch.arange(4)}, path)
    assert "position_ids" not in load_model(folder).weights


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin.*save_pretrained"):
        load_model(folder)


@pytest.mark.parametrize("keep", [0, 5, 2000, -8])
def test_a_truncated_file_is_named(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors: cannot be read"):
        load_model(folder)


def test_a_missing_shard_is_named(tmp_path):
    reference_model("llama").save_pretrained(tmp_path, max_shard_size="100KB")
    first = sorted(tmp_path.glob("*.safetensors"))[0]
    first.unlink()
    with pytest.raises(ValueError, match=first.name):
        load_model(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_an_unreadable_configuration_is_named(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_model(folder)


def test_nothing_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither a folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        Tokenizer(tmp_path)


def test_half_precision_weights_become_float32(folder):
    path = folder / "model.safetensors"
    save_file({name: value.half() for name, value in load_file(path).items()}, path)
    model = load_model(folder)
    transformer = Transformer(model.config, model.weights)
    logits = run(transformer, PagedKVCache(model.config, 4), [Chunk(0, [1, 2, 3], 0)])
    reference = reference_model("llama")
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(parameter.half())
    expected = reference_logits(reference, [1, 2, 3])[-1:]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_random_weights_depend_on_the_seed_alone():
    first, again, other = (random_model(seed=seed).weights for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(first[name], other[name])


def test_random_logits_are_neither_flat_nor_certain():
    model = random_model(TINY_CONFIG)
    cache = PagedKVCache(model.config, 8)
    logits = run(Transformer(model.config, model.weights), cache, [Chunk(0, list(range(50)), 0)])
    assert 0.5 < float(logits.std()) < 2.0


def tiny_gguf(path, metadata=None, extra=None):
    """A GGUF of two layers as converters write it; returns weights by their usual names.

    `metadata` is written with the rest, by key; `extra` are further tensors.
    """
    gguf = pytest.importorskip("gguf")
    rng, weights = np.random.default_rng(0), {}
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {
        "block_count": 2,
        "embedding_length": 32,
        "feed_forward_length": 48,
        "context_length": 64,
        "head_count": 4,
        "head_count_kv": 2,
    }.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    tokens = ["<end>", *"abcdefghijklmno"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*tokens, "ab", "abc"])
    writer.add_token_types([3, *[1] * 17])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_eos_token_id(0)
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (48, 32), "ffn_up": (48, 32), "ffn_down": (32, 48)}
    names = {"token_embd": (18, 32), "output_norm": (32,)}
    for layer in range(2):
        names |= {f"blk.{layer}.{part}": shape for part, shape in shapes.items()}
        names |= {f"blk.{layer}.{part}": (32,) for part in ("attn_norm", "ffn_norm")}
    for name, shape in names.items():
        weights[name] = rng.standard_normal(shape).astype(np.float32)
        stored = weights[name]
        if name.endswith(("attn_q", "attn_k")):  # halves of a head become neighbouring pairs
            stored = stored.reshape(-1, 2, 4, 32).swapaxes(1, 2).reshape(shape)
        writer.add_tensor(f"{name}.weight", stored)
    for key, value in (metadata or {}).items():
        write = writer.add_string if isinstance(value, str) else writer.add_float32
        write(key, value)
    for name, value in (extra or {}).items():
        writer.add_tensor(name, np.asarray(value, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_a_gguf_converts_once_and_keeps_its_weights(tmp_path):
    source, steps = tmp_path / "tiny.gguf", []
    weights = tiny_gguf(source)
    model = load_model(source, cache=tmp_path / "cache", progress=steps.append)
    assert steps
    steps.clear()
    assert load_model(source, cache=tmp_path / "cache", progress=steps.append).name == model.name
    assert not steps
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [model.folder.name]
    assert (model.config.num_kv_heads, model.config.tie_embeddings) == (2, True)
    for ours, theirs in {
        "model.layers.1.self_attn.q_proj.weight": "blk.1.attn_q",
        "model.layers.0.self_attn.k_proj.weight": "blk.0.attn_k",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down",
        "model.norm.weight": "output_norm",
    }.items():
        np.testing.assert_array_equal(model.weights[ours].numpy(), weights[theirs])
    tokenizer = Tokenizer(model.folder)
    assert tokenizer.encode("abcab<end>b") == [17, 16, 0, 2]
    assert tokenizer.decode([17, 0]) == "abc<end>"


@pytest.mark.parametrize(
    "name",
    ["blk.1.ffn_gate_exps.weight", "blk.0.ffn_up.3.weight", "blk.0.ffn_gate_inp.weight",
     "blk.1.attn_q.bias"],
)  # fmt: skip
def test_a_gguf_of_other_layers_is_refused(tmp_path, name):
    tiny_gguf(tmp_path / "mixture.gguf", extra={name: np.ones((2, 32))})
    with pytest.raises(ValueError, match=rf"mixture\.gguf: tensor {name} .*attn_norm, .*dense"):
        load_model(tmp_path / "mixture.gguf", cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("metadata", "extra"),
    [
        ({"llama.rope.scaling.type": "yarn"}, {}),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, {}),
        ({"llama.rope.scaling.factor": float("nan")}, {}),
        ({"llama.rope.scale_linear": 2.0}, {}),
        ({}, {"rope_freqs.weight": [1.0, 1.0, 8.0, 8.0]}),
    ],
)
def test_scaled_rotary_positions_of_a_gguf_are_refused(tmp_path, metadata, extra):
    tiny_gguf(tmp_path / "long.gguf", metadata, extra)
    with pytest.raises(ValueError, match=r"long\.gguf: rope.*give a Hugging Face folder"):
        load_model(tmp_path / "long.gguf", cache=tmp_path / "cache")


def test_rotary_positions_that_are_scaled_by_one_are_plain(tmp_path):
    metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0}
    tiny_gguf(tmp_path / "plain.gguf", metadata, {"rope_freqs.weight": [1.0] * 4})
    load_model(tmp_path / "plain.gguf", cache=tmp_path / "cache")


def test_two_processes_may_convert_at_once(tmp_path):
    source = tmp_path / "tiny.gguf"
    tiny_gguf(source)
    arguments = [(source, tmp_path / "cache", len)] * 2
    with get_context("spawn").Pool(2) as pool:
        folders = pool.starmap(converted_folder, arguments)
    assert folders[0] == folders[1]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folders[0].name]
    load_model(folders[0])


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all" * 100])
def test_an_unreadable_gguf_is_named_and_leaves_nothing(tmp_path, content):
    source = tmp_path / "broken.gguf"
    source.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.gguf: cannot be read"):
        load_model(source, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
