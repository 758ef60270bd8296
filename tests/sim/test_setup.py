"""What cannot run is refused before it starts, with the value, the rule and the way out."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from serving_cases import assert_equal_traces, recorded, tiny_fit

from hardware_models.calibration import Calibration
from hardware_models.parts import load_gpu, load_node
from sim.api import check, run
from sim.costs.fitted import Fitted
from sim.engine import Engine
from sim.metrics import Slo, inter_token_gaps
from sim.models.architecture import load_architecture
from sim.models.parameters import kv_bytes_per_token, weight_bytes
from sim.policies.batching.chunked_prefill import ChunkedPrefill
from sim.scenario import CostFamily, Dtype, Model, Policies, Scenario
from sim.setup import prepare
from sim.units import human_bytes
from sim.workload.poisson import Poisson

NAN, INF = float("nan"), float("inf")


def scenario(**fields: object) -> Scenario:
    """A tiny model on a large GPU, changed as asked."""
    base = {
        "model": Model(name="tiny_llama"),
        "gpu": load_gpu("a100_80g"),
        "workload": Poisson(rate_per_s=50.0, num_requests=60, input_tokens=40, output_tokens=8),
    }
    return Scenario(**(base | fields))


def test_the_pool_is_what_weights_and_activations_leave() -> None:
    setup = prepare(scenario(model=Model(name="llama_3_8b")))
    gpu, llama = load_gpu("a100_80g"), load_architecture("llama_3_8b")
    share = 0.9 * gpu.peak.memory_bytes - weight_bytes(llama, 2)
    pool = setup.limits.num_blocks * setup.limits.block_size * kv_bytes_per_token(llama, 2)
    assert 0.95 * share < pool < share
    assert setup.kv_bytes_per_token == kv_bytes_per_token(llama, 2)
    assert setup.max_model_tokens == llama.max_position_embeddings
    halved = prepare(scenario(model=Model(name="llama_3_8b", kv_dtype=Dtype.fp8)))
    assert halved.limits.num_blocks in (
        2 * setup.limits.num_blocks,
        2 * setup.limits.num_blocks + 1,
    )


def test_a_model_that_does_not_fit_says_by_how_much() -> None:
    need = human_bytes(weight_bytes(load_architecture("llama_3_70b"), 2))
    message = (
        rf"llama_3_70b in bf16 does not fit: {need} for weights .* leave \d+\.\d GiB too little "
        r"for the weights alone; take tp_size=2 \(the smallest that fits\)"
    )
    with pytest.raises(ValueError, match=message):
        prepare(scenario(model=Model(name="llama_3_70b")))


def test_more_blocks_than_fit_are_refused() -> None:
    fitting = prepare(scenario()).limits.num_blocks
    assert prepare(scenario(engine=Engine(num_blocks=fitting))).limits.num_blocks == fitting
    with pytest.raises(
        ValueError, match=rf"for {fitting + 1} KV blocks are needed; a100_80g has .* fewer"
    ):
        prepare(scenario(engine=Engine(num_blocks=fitting + 1)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_num_seqs": 0}, r"engine\.max_num_seqs=0 must be at least 1"),
        ({"block_size": 0}, r"engine\.block_size=0 must be at least 1"),
        ({"num_blocks": 0}, r"engine\.num_blocks=0 must be at least 1, or null"),
        ({"max_model_len": -1}, r"engine\.max_model_len=-1 must be at least 1, or null"),
        ({"memory_utilization": 1.5}, r"memory_utilization=1\.5 must be in \(0, 1\]"),
        ({"iteration_overhead_s": -1e-6}, r"iteration_overhead_s=-1e-06 must not be negative"),
        ({"iteration_overhead_s": NAN}, r"iteration_overhead_s=nan must .* finite; give seconds"),
        ({"iteration_overhead_s": INF}, r"iteration_overhead_s=inf must .* finite"),
        ({"memory_utilization": NAN}, r"memory_utilization=nan must be in \(0, 1\]"),
        ({"max_num_batched_tokens": 8}, r"max_num_batched_tokens=8 .*max_num_seqs=256.*raise"),
    ],
)
def test_limits_out_of_range_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(**fields)


@pytest.mark.parametrize("value", [NAN, INF, -1.0])
@pytest.mark.parametrize("demand", ["ttft_s", "tpot_s", "e2e_s"])
def test_a_demand_is_a_number_of_seconds(demand: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"slo\.{demand}={value} must be above 0 .* finite"):
        Slo(**{demand: value})


@pytest.mark.parametrize("value", [NAN, INF, -0.1, 1.0])
@pytest.mark.parametrize("share", ["warm_up", "drain"])
def test_a_share_of_the_span_leaves_something(share: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{share}={value}.* leave something between them"):
        scenario(**{share: value})


@pytest.mark.parametrize("value", [NAN, INF, 0.0, -0.1])
def test_an_accepted_error_is_a_number_above_zero(value: float) -> None:
    with pytest.raises(ValueError, match=rf"accept\.ttft_p50_s={value} must be above 0 and finite"):
        scenario(accept={"tpot_p50_s": 0.1, "ttft_p50_s": value})


def test_a_context_beyond_the_model_is_refused_and_a_smaller_one_holds() -> None:
    with pytest.raises(ValueError, match=r"max_model_len=4096 exceeds the 2048 tokens of context"):
        prepare(scenario(engine=Engine(max_model_len=4096)))
    shorter = scenario(engine=Engine(max_model_len=47))
    with pytest.raises(ValueError, match=r"request 0 needs 40 prompt \+ 8 output = 48.*at most 47"):
        check(shorter)


def test_a_request_that_the_pool_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"request 0 needs .* at most 32 fit"):
        check(scenario(engine=Engine(num_blocks=2)))


def test_hardware_must_be_named_once() -> None:
    with pytest.raises(ValueError, match=r"neither node nor gpu is given"):
        prepare(scenario(gpu=None))
    with pytest.raises(ValueError, match=r"node=a100_80g_x1 and gpu=a100_80g are given together"):
        scenario(node=load_node("a100_80g_x1"))


def test_fitted_costs_need_a_calibration_of_the_model() -> None:
    with pytest.raises(ValueError, match=r"tiny_llama on a100_80g; there is one of: none; run"):
        prepare(scenario(cost=CostFamily.fitted))
    fits = Calibration(
        fingerprint="f", torch_version="2", threads=1, models={"tiny_llama": tiny_fit().fit}
    )
    node = replace(load_node("a100_80g_x1"), calibration=fits)
    calibrated = scenario(gpu=None, node=node, cost=CostFamily.fitted)
    with pytest.raises(ValueError, match=r"model.dtype=bf16 was not calibrated, fp32 was"):
        prepare(calibrated)
    setup = prepare(replace(calibrated, model=Model(name="tiny_llama", dtype=Dtype.fp32)))
    assert isinstance(setup.cost, Fitted)


def test_settings_without_effect_are_warned_of() -> None:
    narrow = Engine(max_num_seqs=8, max_num_batched_tokens=64)
    chunked = Policies(batching=ChunkedPrefill(chunk_tokens=128))
    with pytest.warns(UserWarning, match=r"chunk_tokens=128 is above engine.max_num_batched"):
        check(scenario(engine=narrow, policy=chunked))
    with pytest.warns(UserWarning, match=r"has 8 GPUs and one replica uses 1;"):
        check(scenario(gpu=None, node=load_node("a100_80g_x8")))


def test_a_run_leaves_its_scenario_alone_and_repeats_itself() -> None:
    study = scenario(seeds=[0, 1], slo=Slo(ttft_s=1.0))
    before = deepcopy(study)
    one, other = run(study), run(study)
    assert study == before
    for first, second in zip(one.traces, other.traces, strict=True):
        assert_equal_traces(first, second)
    assert [list(row.items()) for row in map(plain, one.figures)] == [
        list(row.items()) for row in map(plain, other.figures)
    ]
    first, second = (trace.requests["arrival_s"] for trace in one.traces)
    assert not np.array_equal(first, second)


def plain(figures: object) -> dict[str, str]:
    """Figures as text, in which one not-a-number equals another."""
    return {name: repr(value) for name, value in figures.items()}


def test_another_policy_sees_the_same_requests() -> None:
    traces = [
        run(scenario(policy=policy)).trace
        for policy in (Policies(), Policies(batching=ChunkedPrefill()))
    ]
    for name in ("request", "arrival_s", "prompt_tokens", "output_tokens"):
        np.testing.assert_array_equal(*(trace.requests[name] for trace in traces))


def test_every_latency_of_a_summary_is_of_the_steady_window() -> None:
    # One slow answer before the window and one after it; everything inside is alike.
    rows = [(0.0, 900, 2), *[(5.0 + at, 40, 3) for at in range(10)], (20.0, 900, 2)]
    result = run(scenario(workload=recorded(rows)))
    assert result["counted_requests"] == 10
    inside = inter_token_gaps(result.trace, np.arange(1, 11))
    assert result["itl_p99_s"] == inside.percentile(99)
    assert inside.weight.sum() == 20
    for figure in ("ttft", "itl", "tpot", "e2e"):
        assert result[f"{figure}_p99_s"] == pytest.approx(result[f"{figure}_p50_s"], rel=1e-3)


def test_a_result_is_written_whole_and_never_over_something_else(tmp_path: Path) -> None:
    result = run(scenario())
    folder = result.save(tmp_path / "out")
    assert sorted(path.name for path in folder.iterdir()) == [
        "requests.parquet", "summary.json", "trace",
    ]  # fmt: skip
    result.save(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("draft")
    with pytest.raises(ValueError, match=r"holds thesis.txt, which is no part of a result"):
        result.save(tmp_path / "mine")
