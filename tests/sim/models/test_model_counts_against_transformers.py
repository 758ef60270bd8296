"""Our closed forms against the modules of transformers: parameters and FLOPs, to the last one.

The torch and transformers here are the reference; what is tested needs neither.
"""

import json

import pytest

from sim.models.architecture import config_path, known_architectures, load_architecture
from sim.models.flops import matmul_flops
from sim.models.parameters import total_parameters

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
flop_counter = pytest.importorskip("torch.utils.flop_counter")

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 130,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
SHARED = {**SIZES, **EXPERTS, "shared_expert_intermediate_size": 72}
GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 8, "n_positions": 64, "vocab_size": 130}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
DBRX = {
    "d_model": 64,
    "n_heads": 8,
    "n_layers": 3,
    "max_seq_len": 64,
    "vocab_size": 130,
    "attn_config": {"kv_n_heads": 4, "clip_qkv": 8, "rope_theta": 500000},
    "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 6, "moe_top_k": 3},
}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
SMALL = {
    "llama": ("llama", {**SIZES, **UNTIED}),
    "llama_tied": ("llama", {**SIZES, **TIED}),
    "llama_attention_bias": ("llama", {**SIZES, "attention_bias": True}),
    "llama_mlp_bias_wide_heads": ("llama", {**SIZES, "mlp_bias": True, "head_dim": 12}),
    "mistral": ("mistral", {**SIZES, "sliding_window": None}),
    "mistral_window_tied": ("mistral", {**SIZES, **TIED, "sliding_window": 4}),
    "qwen2": ("qwen2", {**SIZES, **UNTIED}),
    "qwen2_tied": ("qwen2", {**SIZES, **TIED}),
    "qwen3": ("qwen3", {**SIZES, "head_dim": 16}),
    "qwen3_bias_tied": ("qwen3", {**SIZES, **TIED, "head_dim": 16, "attention_bias": True}),
    "gpt2": ("gpt2", {**GPT2, **TIED}),
    "gpt2_untied_narrow": ("gpt2", {**GPT2, **UNTIED, "n_inner": 100}),
    "mixtral": ("mixtral", {**SIZES, "num_local_experts": 6, "num_experts_per_tok": 2}),
    "mixtral_tied": (
        "mixtral",
        {**SIZES, **TIED, "num_local_experts": 3, "num_experts_per_tok": 3},
    ),
    "qwen2_moe": ("qwen2_moe", SHARED),
    "qwen2_moe_every_other_tied": ("qwen2_moe", {**SHARED, **TIED, "decoder_sparse_step": 2}),
    "qwen2_moe_without_bias": ("qwen2_moe", {**SHARED, "qkv_bias": False, "mlp_only_layers": [1]}),
    "qwen3_moe": ("qwen3_moe", {**SIZES, **EXPERTS}),
    "qwen3_moe_bias_wide_heads": (
        "qwen3_moe",
        {**SIZES, **EXPERTS, **TIED, "attention_bias": True, "head_dim": 16},
    ),
    "dbrx": ("dbrx", DBRX),
}


def build(family, values, device):
    config = transformers.AutoConfig.for_model(family, **values)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", experts_implementation="eager"
        )


def count(model):
    # `parameters` yields a shared tensor once.
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", known_architectures())
def test_parameters_of_shipped_architectures_are_those_of_the_module(name):
    values = json.loads(config_path(name).read_text())
    model = build(values.pop("model_type"), values, "meta")
    assert total_parameters(load_architecture(name)) == count(model)


@pytest.mark.parametrize(("family", "values"), SMALL.values(), ids=SMALL)
def test_parameters_of_every_family_are_those_of_the_module(family, values):
    architecture = load_architecture({**values, "model_type": family})
    assert total_parameters(architecture) == count(build(family, values, "meta"))


@pytest.mark.parametrize(("family", "values"), SMALL.values(), ids=SMALL)
def test_a_config_saved_by_transformers_reads_as_the_same_architecture(family, values, tmp_path):
    transformers.AutoConfig.for_model(family, **values).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert load_architecture(saved) == load_architecture({**values, "model_type": family})


@pytest.mark.parametrize(("batch", "sequence"), [(1, 1), (2, 7)])
@pytest.mark.parametrize(("family", "values"), SMALL.values(), ids=SMALL)
def test_flops_of_every_family_are_those_of_the_counter(family, values, batch, sequence):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # The counter tracks modules through gradients, which views made under no_grad cannot give.
    model = build(family, values, "cpu").eval().requires_grad_(False)
    tokens = torch.randint(0, 130, (batch, sequence))
    with flop_counter.FlopCounterMode(display=False) as counter:
        model(tokens)
    architecture = load_architecture({**values, "model_type": family})
    assert matmul_flops(architecture, batch, sequence) == counter.get_total_flops()
