"""What a config.json may say, and what is refused with which words."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from sim.models.architecture import config_path, known_architectures, load_architecture

LLAMA = json.loads(config_path("tiny_llama").read_text())
MISTRAL = json.loads(config_path("mistral_7b").read_text())
QWEN_MOE = {
    "model_type": "qwen2_moe",
    "hidden_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 80,
}


def test_shipped_architectures_have_the_published_sizes():
    smollm2 = load_architecture("smollm2_135m")
    assert (smollm2.num_layers, smollm2.hidden_size, smollm2.head_dim) == (30, 576, 64)
    assert smollm2.tie_embeddings
    assert smollm2.rope_theta == 1e5
    assert load_architecture("mistral_7b").sliding_window == 4096
    assert load_architecture("qwen1_5_1_8b").qkv_bias
    dbrx = load_architecture("dbrx")
    assert (dbrx.num_experts, dbrx.experts_per_token, dbrx.num_kv_heads) == (16, 4, 8)
    assert (dbrx.norm, dbrx.rope_theta, dbrx.num_dense_layers) == ("layer", 5e5, 0)


def test_every_shipped_architecture_is_named_as_its_file():
    assert len(known_architectures()) >= 10
    for name in known_architectures():
        assert load_architecture(name).name == name


def test_a_name_a_file_a_folder_and_the_values_read_alike(tmp_path):
    folder = tmp_path / "tiny_llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    read = load_architecture("tiny_llama")
    assert load_architecture(folder) == read
    assert load_architecture(str(folder / "config.json")) == read
    assert replace(load_architecture(LLAMA), name="tiny_llama") == read


def test_rope_theta_is_found_where_older_and_newer_files_keep_it():
    bare = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    assert load_architecture(bare).rope_theta == 1e4
    newer = {**bare, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    assert load_architecture(newer).rope_theta == 5e5


def test_a_written_head_size_need_not_be_the_even_share():
    read = load_architecture({**LLAMA, "head_dim": 32})
    assert (read.query_size, read.kv_size) == (256, 128)


def test_sparse_layers_follow_step_and_exceptions():
    read = load_architecture({**QWEN_MOE, "decoder_sparse_step": 2})
    assert read.sparse_layers == (1, 3)
    assert load_architecture({**QWEN_MOE, "mlp_only_layers": [0, 2]}).sparse_layers == (1, 3, 4)
    dense = load_architecture({**QWEN_MOE, "num_experts": 0})
    assert (dense.sparse_layers, dense.num_experts, dense.num_dense_layers) == ((), 0, 5)


def test_weights_of_experts_add_up_to_one_where_the_family_or_the_file_says_so():
    assert load_architecture("mixtral_8x7b").renormalise_top_k
    assert load_architecture("qwen3_30b_a3b").renormalise_top_k
    assert load_architecture("dbrx").renormalise_top_k
    assert not load_architecture("llama_3_8b").renormalise_top_k
    assert not load_architecture(QWEN_MOE).renormalise_top_k  # transformers' default
    assert load_architecture({**QWEN_MOE, "norm_topk_prob": True}).renormalise_top_k
    assert not load_architecture({**QWEN_MOE, "norm_topk_prob": False}).renormalise_top_k


def test_an_unknown_family_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"model_type='bert' is not known; known are dbrx, gpt2,"):
        load_architecture({"model_type": "bert"})


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"model 'lama' is neither a file.*dbrx, llama_2_13b"):
        load_architecture("lama")


def test_a_missing_key_is_named_with_its_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({k: v for k, v in LLAMA.items() if k != "hidden_size"}))
    with pytest.raises(ValueError, match=r"config\.json: hidden_size is missing"):
        load_architecture(path)


def test_a_nested_missing_key_is_named_with_its_section():
    dbrx = json.loads(config_path("dbrx").read_text())
    del dbrx["ffn_config"]["moe_top_k"]
    with pytest.raises(ValueError, match=r"ffn_config\.moe_top_k is missing"):
        load_architecture(dbrx)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_file_that_is_not_an_object_is_refused(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: (not JSON|must hold one JSON object)"):
        load_architecture(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**LLAMA, "hidden_size": 65}, "hidden_size=65 must be a multiple of the number of heads"),
        ({**LLAMA, "num_key_value_heads": 3}, "num_kv_heads=3 must divide num_heads=8"),
        ({**LLAMA, "num_hidden_layers": 0}, "num_layers=0 must be at least 1"),
        ({**LLAMA, "num_hidden_layers": "2"}, "num_hidden_layers='2' must be a whole number"),
        ({**LLAMA, "num_hidden_layers": True}, "num_hidden_layers=True must be a whole number"),
        ({**LLAMA, "attention_bias": 1}, "attention_bias=1 must be true or false"),
        ({**LLAMA, "head_dim": 7}, "head_dim=7 must be even"),
        ({**LLAMA, "rope_parameters": 3}, "rope_parameters=3 must be an object"),
        ({**MISTRAL, "sliding_window": 0}, "sliding_window=0 must be at least 1"),
        ({k: v for k, v in MISTRAL.items() if k != "sliding_window"}, "sliding_window is missing"),
        ({**QWEN_MOE, "num_experts_per_tok": 5}, "experts_per_token=5 must lie in 1 to"),
        ({**QWEN_MOE, "norm_topk_prob": 1}, "norm_topk_prob=1 must be true or false"),
        ({**QWEN_MOE, "decoder_sparse_step": 0}, "decoder_sparse_step=0 must be at least 1"),
        ({**QWEN_MOE, "mlp_only_layers": ["a"]}, "must be a list of whole numbers"),
        ({**QWEN_MOE, "use_sliding_window": True}, "use_sliding_window=true"),
    ],
)
def test_nonsense_is_refused_with_value_and_rule(config, message):
    with pytest.raises(ValueError, match=message):
        load_architecture(config)


def test_reading_an_architecture_imports_no_framework():
    code = (
        "import sys; from sim.models.architecture import load_architecture; import sim.models.work;"
        "load_architecture('llama_3_8b');"
        "print({'torch', 'transformers', 'hydra', 'numpy', 'simpy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "set()"
