"""Models with experts as folders: every spelling reads alike, and what does not fit is refused."""

import json

import pytest
import torch
from model_cases import EXPERT_CASES, reference_model
from safetensors.torch import load_file, save_file

from backends.model_tensors import down_name, expected_shapes, gate_name, gate_up_name
from backends.weights import load_model, random_model, shipped_config
from sim.models.architecture import load_architecture


@pytest.fixture(scope="module", params=EXPERT_CASES)
def folders(request, tmp_path_factory):
    """One model as it is published, and as transformers holds it in memory."""
    reference, folder = reference_model(request.param), tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(folder / "published")
    reference.save_pretrained(folder / "fused", save_original_format=False)
    return reference, folder / "published", folder / "fused"


def test_both_spellings_hold_the_weights_of_transformers(folders):
    reference, *paths = folders
    names = [set(load_file(path / "model.safetensors")) for path in paths]
    assert names[0].isdisjoint(name for name in names[1] if ".experts." in name)
    expected = reference.state_dict()
    for path in paths:
        model = load_model(path)
        shapes = expected_shapes(model.config)
        assert {gate_name(1), gate_up_name(1), down_name(1)} <= shapes.keys()
        for name, shape in shapes.items():
            assert model.weights[name].shape == shape
            torch.testing.assert_close(model.weights[name], expected[name], rtol=0, atol=0)


def test_renormalised_weights_are_as_the_configuration_says(folders):
    reference, published, _ = folders
    config = reference.config
    renormalises = config.model_type == "mixtral" or config.norm_topk_prob
    assert load_model(published).config.renormalise_top_k is renormalises


def test_shards_hold_the_same_experts(folders, tmp_path):
    reference, published, _ = folders
    reference.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    whole, sharded = (load_model(path).weights for path in (published, tmp_path))
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)


@pytest.fixture
def mixtral(tmp_path):
    reference_model("mixtral").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.block_sparse_moe.experts.7.w1.weight",
        "model.layers.0.block_sparse_moe.experts.3.w2.weight",
        "model.layers.1.block_sparse_moe.experts.0.w3.weight",
        "model.layers.0.block_sparse_moe.gate.weight",
    ],
)
def test_a_missing_or_misshapen_tensor_is_named_as_the_folder_would(mixtral, name):
    path = mixtral / "model.safetensors"
    tensors = load_file(path)
    cut = tensors.pop(name)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=rf"tensor {name} is missing"):
        load_model(mixtral)
    save_file(tensors | {name: cut[:-1].clone()}, path)
    with pytest.raises(ValueError, match=rf"{name} has shape .*do not belong together"):
        load_model(mixtral)
    save_file(tensors | {name: cut.to(torch.int8)}, path)
    with pytest.raises(ValueError, match=rf"model\.safetensors: {name} has dtype torch.int8"):
        load_model(mixtral)


def test_a_misshapen_fused_tensor_is_named(tmp_path):
    reference_model("qwen3_moe").save_pretrained(tmp_path, save_original_format=False)
    path, name = tmp_path / "model.safetensors", gate_up_name(1)
    tensors = load_file(path)
    save_file(tensors | {name: tensors[name].transpose(1, 2).contiguous()}, path)
    with pytest.raises(ValueError, match=rf"{name} has shape \[6, 64, 80\], but .* \[6, 80, 64\]"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_local_experts": 9}, r"gate.weight has shape \[8, 64\], but .* \[9, 64\]"),
        ({"num_local_experts": 7}, r"gate.weight has shape \[8, 64\], but .* \[7, 64\]"),
        ({"intermediate_size": 48}, r"experts.0.w1.weight has shape \[96, 64\]"),
        ({"num_experts_per_tok": 9}, "experts_per_token=9 must lie in 1 to num_experts=8"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' must be 'silu'"),
        ({"model_type": "dbrx"}, "model_type='dbrx' is not run here; families are .*mixtral"),
    ],
)
def test_a_configuration_of_other_experts_is_refused(mixtral, change, message):
    path = mixtral / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_model(mixtral)


def test_random_weights_fit_the_shipped_tiny_mixtral():
    model = random_model(shipped_config("tiny_mixtral"))
    tiny = load_architecture("tiny_mixtral")
    assert (tiny.num_experts, tiny.experts_per_token, tiny.moe_intermediate_size) == (8, 2, 96)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.weights.items()}
    assert expected_shapes(tiny).items() <= shapes.items()
    assert model.name == "random-mixtral-0"
