"""Calibration measures the replica's own loop, and no shape that validation asks about."""

from dataclasses import replace

import numpy as np
import pytest

from backends.calibration import Passes, time_batch
from backends.serving import open_model, use_one_thread
from hardware_models.parts import load_gpu, read_node
from scenarios import calibrate
from scenarios.cli import main
from scenarios.validation import timing
from scenarios.validation.options import with_short_chunks
from sim.costs.calibration_plan import BatchPlan, heldout_batches, training_batches
from sim.costs.fitted import Fitted
from sim.costs.fitting import Measured, fit_iteration, jitter_quantiles, relative_errors
from sim.decision_rows import expand
from sim.models.architecture import load_architecture
from sim.models.work import IterationShape
from sim.policies.registry import policies
from sim.workload.source import Source


def synthetic_seconds(shape):
    """A machine whose cost is known."""
    body = 0.02 + 0.002 * shape.tokens
    return (
        body + 0.01 + 1e-6 * shape.prefill_pairs + 2e-5 * shape.decode_context
        + 0.003 * shape.num_prefills
    )  # fmt: skip


def synthetic_fit():
    train = [Measured(p.shape, synthetic_seconds(p.shape)) for p in training_batches()]
    heldout = [Measured(p.shape, synthetic_seconds(p.shape)) for p in heldout_batches()]
    return fit_iteration(train, heldout, "fp32"), heldout


def test_fit_recovers_a_cost_of_its_own_form():
    fit, heldout = synthetic_fit()
    assert relative_errors(fit, heldout).max() < 1e-6
    assert fit.heldout_median_error < 1e-6


def test_held_out_shapes_are_not_fitted():
    assert not {p.shape for p in training_batches()} & {p.shape for p in heldout_batches()}
    measured = [Measured(p.shape, 1.0) for p in training_batches()]
    with pytest.raises(ValueError, match="hold out shapes"):
        fit_iteration(measured, measured[:3], "fp32")


@pytest.mark.parametrize("rule", sorted(policies("batching")))
@pytest.mark.parametrize("profile", ["quick", "full"])
def test_no_shape_of_the_timed_validation_is_among_those_calibrated(rule, profile):
    cost = Fitted(synthetic_fit()[0])
    everyone = {name: with_short_chunks(kind()) for name, kind in policies("batching").items()}
    rate = 0.6 * timing.capacity_per_s(everyone.values(), cost)
    requests, repeats = {"quick": (30, 3), "full": (200, 5)}[profile]
    batching = everyone[rule]
    calibrated = {p.shape for p in (*training_batches(), *heldout_batches())}
    for seed in range(repeats):
        workload = timing.workload(rate, requests)
        trace = timing.predict(Source(workload, seed, timing.CONTEXT), batching, cost)
        assert not calibrated & shapes_of(trace)


def shapes_of(trace):
    """Every iteration's shape; within a decode stretch the context grows by one a request."""
    columns = [trace.decisions[name].tolist() for name in IterationShape._fields]
    found = set()
    for repeat, *row in zip(trace.decisions["repeat"].tolist(), *columns, strict=True):
        shape = IterationShape(*row)
        for step in range(repeat):
            context = shape.decode_context + step * shape.num_decodes
            found.add(shape._replace(decode_context=context))
    assert len(expand(trace)) == trace.num_iterations
    return found


def test_a_timed_batch_has_the_shape_that_was_planned():
    use_one_thread()
    model = open_model("random", "cpu")[1]
    plan = BatchPlan(chunks=((5, 3), (9, 0)), contexts=(17, 1))
    assert time_batch(model, plan) > 0
    ticks = []
    passes = Passes(model, [plan], lambda: ticks.append(1))
    passes.time()
    passes.time(part=0, parts=2)
    assert [m.shape for m in passes.measured()] == [plan.shape]
    assert len(ticks) == 3


def test_jitter_is_what_is_left_of_timings_without_their_batch_and_their_pass():
    rng = np.random.default_rng(0)
    passes = Passes.__new__(Passes)
    batches, slow = rng.uniform(0.01, 0.5, 400), rng.uniform(0.9, 1.2, 6)
    jitter = rng.normal(1.0, 0.06, (400, 6))
    passes._seconds = (batches[:, None] * slow * jitter).tolist()
    found = np.array(passes.jitter())
    assert found.mean() == pytest.approx(1.0, abs=1e-9)
    assert found.std() == pytest.approx(0.06, rel=0.1)
    quantiles = jitter_quantiles(found.tolist())
    assert np.percentile(quantiles, 99) == pytest.approx(np.percentile(jitter, 99), rel=0.02)
    passes._seconds = [[1.0], [2.0]]
    assert passes.jitter() == jitter_quantiles([]) == []


def test_calibrate_writes_a_node_that_a_study_can_use(tmp_path, monkeypatch, capsys):
    path = tmp_path / "node" / "this_machine.yaml"
    assert main(["calibrate", "weights=random", "repeats=1", f"out={path}"]) == 0
    assert "median error" in capsys.readouterr().out
    node = read_node(path)
    fit = node.calibration.models["tiny_llama"]
    assert fit.num_shapes == len(training_batches())
    assert fit.jitter == []
    monkeypatch.setenv("DIPTYCH_PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    chosen = ["node=this_machine", "cost=fitted", "model=tiny_llama", "model.dtype=fp32"]
    sizes = ["workload=poisson", "workload.num_requests=20", "workload.rate_per_s=20",
             "workload.input_tokens=30", "workload.output_tokens=10", "seeds=[0]"]  # fmt: skip
    assert main(["run", "-cn", "replica", *chosen, *sizes, f"out={tmp_path / 'result'}"]) == 0


def test_a_model_of_ones_own_is_found_again_by_the_name_it_was_stored_under(tmp_path, monkeypatch):
    fit = synthetic_fit()[0]
    path = tmp_path / "node.yaml"
    calibrate.write(fit, "my_model", "cpu", path)
    assert calibrate.stored(path, "my_model", "cpu") == fit
    assert calibrate.stored(path, "other", "cpu") is None
    calibrate.write(fit, "random-llama-0", "cpu", path)
    assert set(read_node(path).calibration.models) == {"my_model", "tiny_llama"}


def test_the_random_weights_are_those_of_the_shipped_tiny_llama():
    model = open_model("random", "cpu")[0]
    assert calibrate.fit_name(model.name) == "tiny_llama"
    assert replace(model.config, name="tiny_llama") == load_architecture("tiny_llama")


@pytest.mark.parametrize(
    ("name", "part"),
    [("NVIDIA A40", "a40"), ("NVIDIA H100 80GB HBM3", "h100_sxm"), ("NVIDIA L40S", "l40s")],
)
def test_a_gpu_is_known_by_its_whole_name(name, part):
    assert calibrate.gpu_part(name) == part
    load_gpu(part)


@pytest.mark.parametrize("name", ["NVIDIA RTX A4000", "NVIDIA H100 PCIe", "NVIDIA GH200 480GB"])
def test_a_gpu_that_only_sounds_alike_is_refused(name):
    with pytest.raises(ValueError, match="is not known"):
        calibrate.gpu_part(name)


def test_calibrate_refuses_a_file_that_it_could_not_write_before_measuring(tmp_path, capsys):
    (tmp_path / "broken.yaml").write_text("name: [")
    for out in (tmp_path, tmp_path / "broken.yaml", "/proc/nowhere/node.yaml"):
        assert main(["calibrate", "weights=random", "repeats=1", f"out={out}"]) == 2
    assert "timing" not in capsys.readouterr().err
    assert (tmp_path / "broken.yaml").read_text() == "name: ["


def test_calibrate_refuses_an_unknown_key_and_a_bad_value(capsys):
    assert main(["calibrate", "reppeats=1"]) == 2
    assert "reppeats" in capsys.readouterr().err
    assert main(["calibrate", "repeats=0"]) == 2
    assert "repeats=0 must be at least 1" in capsys.readouterr().err
