"""What real engines choose for a device, and what is left of its memory."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware_models.parts import load_gpu
from sim.engine import Engine
from sim.engine_profiles import ENGINES, VLLM_V1, batch_limits
from sim.memory import memory_need
from sim.models.architecture import load_architecture
from sim.models.parallel import stage_part, tensor_part
from sim.models.parameters import kv_bytes_per_token, total_parameters, weight_bytes
from sim.scenario import Model, Scenario
from sim.setup import prepare


@pytest.mark.parametrize(
    ("gpu", "limits"),
    [("h100_sxm", (1024, 8192)), ("h200", (1024, 8192)), ("rtx_pro_6000", (1024, 8192)),
     ("a100_80g", (256, 2048)), ("l40s", (256, 2048)), ("rtx_4090", (256, 2048))],
)  # fmt: skip
def test_vllm_takes_larger_batches_on_large_devices_but_the_a100(
    gpu: str, limits: tuple[int, int]
) -> None:
    assert batch_limits(VLLM_V1, load_gpu(gpu)) == limits


def test_limits_that_are_given_are_kept() -> None:
    def limits(sequences: int | None, tokens: int | None) -> tuple[int, int]:
        engine = Engine(max_num_seqs=sequences, max_num_batched_tokens=tokens)
        return batch_limits(engine, load_gpu("h100_sxm"))

    assert limits(64, None) == (64, 8192)
    assert limits(None, 512) == (512, 512)
    assert limits(None, 16384) == (1024, 16384)
    assert limits(10000, None) == (10000, 10000)


def test_every_profile_is_known_by_its_own_name() -> None:
    assert {name: engine.name for name, engine in ENGINES.items()} == {
        name: name for name in ENGINES
    }


def pool_bytes(gpu: str, model: str, engine: Engine = VLLM_V1, tp_size: int = 1) -> float:
    setup = prepare(
        Scenario(gpu=load_gpu(gpu), model=Model(name=model), engine=engine, tp_size=tp_size)
    )
    return setup.limits.num_blocks * 16 * setup.kv_bytes_per_token / tp_size


@pytest.mark.parametrize(
    ("model", "ranks", "published_gib"),
    [("llama_3_1_8b", 1, 1.89), ("llama_3_1_8b", 2, 1.89), ("qwen2_5_7b", 1, 2.21),
     ("qwen3_8b", 1, 2.21), ("qwen3_30b_a3b", 1, 2.68), ("mixtral_8x7b", 2, 1.21),
     ("llama_3_1_70b", 2, 1.96), ("qwen2_5_72b", 2, 2.29)],
)  # fmt: skip
def test_what_a_pass_and_its_sampling_take_follows_from_the_shapes_of_tensors(
    model: str, ranks: int, published_gib: float
) -> None:
    """ "Capacity Planner Accuracy Report": "torch peak memory increase" of vLLM 0.19 on H100."""
    whole = load_architecture(model)
    need = memory_need(VLLM_V1, (1024, 8192), whole, tensor_part(whole, ranks), 2, sm_count=132)
    cublas_workspace = 32 * 2**20
    peak = need.experts + max(need.activations, need.sampling) + cublas_workspace
    assert peak / 2**30 == pytest.approx(published_gib, abs=0.01)


@pytest.mark.parametrize(("model", "published_gib"), [("llama_3_1_8b", 58.11), ("qwen3_8b", 57.5)])
def test_the_pool_is_what_vllm_reported(model: str, published_gib: float) -> None:
    """The same report, 0.95 of an H100; of Qwen3-8B it gives the parts of the sum."""
    engine = replace(VLLM_V1, memory_utilization=0.95)
    assert pool_bytes("h100_sxm", model, engine) / 2**30 == pytest.approx(published_gib, abs=0.05)


def test_an_engine_that_compiles_while_it_measures_has_the_smaller_pool() -> None:
    """vLLM's issue 54383: on an RTX 4090 a second start has 0.47 GiB more than the first."""
    warm = replace(VLLM_V1, compile_bytes=0)
    gained = pool_bytes("rtx_4090", "llama_3_1_8b", warm) - pool_bytes("rtx_4090", "llama_3_1_8b")
    assert 0.2 < gained / 2**30 < 0.5
    # On large batches sampling takes more than compiling does.
    assert pool_bytes("h100_sxm", "llama_3_1_8b", warm) == pool_bytes("h100_sxm", "llama_3_1_8b")


@given(
    sequences=st.integers(1, 512), tokens=st.integers(512, 8192), more=st.integers(1, 512),
    model=st.sampled_from(["llama_3_8b", "qwen3_30b_a3b", "mixtral_8x7b", "tiny_llama"]),
)  # fmt: skip
def test_larger_limits_never_need_less_memory(
    sequences: int, tokens: int, more: int, model: str
) -> None:
    whole = load_architecture(model)

    def total(sequences: int, tokens: int) -> float:
        return memory_need(VLLM_V1, (sequences, tokens), whole, whole, 2, sm_count=100).total

    assert total(sequences, tokens) <= total(sequences + more, tokens)
    assert total(sequences, tokens) <= total(sequences, tokens + more)


def test_cards_with_error_correction_in_their_memory_have_less_of_it() -> None:
    for name in ("a10g", "a40", "l40s", "l20"):
        gpu = load_gpu(name)
        assert gpu.usable_memory_bytes == gpu.peak.memory_bytes * 15 // 16
    assert load_gpu("a100_80g").usable_memory_bytes == load_gpu("a100_80g").peak.memory_bytes


@pytest.mark.parametrize("model", ["llama_3_8b", "mixtral_8x7b", "qwen3_32b"])
@pytest.mark.parametrize("tp_size", [2, 4])
def test_ranks_together_hold_the_model_and_its_norms_once_each(model: str, tp_size: int) -> None:
    whole = load_architecture(model)
    part = tensor_part(whole, tp_size)
    shared = total_parameters(part) * tp_size - total_parameters(whole)
    # What every rank repeats: norms, and the routers of experts.
    assert 0 <= shared < 0.001 * tp_size * total_parameters(whole)
    assert kv_bytes_per_token(part, 2) * tp_size == kv_bytes_per_token(whole, 2)


def test_stages_share_out_the_layers() -> None:
    whole = load_architecture("llama_3_8b")
    stages = [stage_part(whole, 3, stage).num_layers for stage in range(3)]
    assert stages == [11, 11, 10]
    assert weight_bytes(stage_part(whole, 2), 2) < 0.6 * weight_bytes(whole, 2)
