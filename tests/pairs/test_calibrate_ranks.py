"""Collectives are timed, fitted on some payloads, judged on others, and kept in the node file."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.collective_timing import OPERATIONS, time_collectives
from hardware_models.parts import read_node
from scenarios import calibrate
from scenarios.calibrate_ranks import fit, is_within
from scenarios.cli import main
from sim.costs.collective_fitting import HELDOUT_BYTES, TRAINING_BYTES, fit_alpha_beta

PAYLOADS = sorted(TRAINING_BYTES + HELDOUT_BYTES)


@given(st.floats(1e-6, 1e-2), st.floats(1e8, 1e12))
def test_a_latency_and_a_bandwidth_are_found_again(latency_s, bandwidth):
    seconds = [latency_s + payload / bandwidth for payload in TRAINING_BYTES]
    found = fit_alpha_beta(TRAINING_BYTES, seconds)
    for payload in PAYLOADS:
        assert found.seconds(payload) == pytest.approx(latency_s + payload / bandwidth, rel=1e-6)


@pytest.mark.parametrize(
    ("payloads", "seconds", "message"),
    [
        ([256], [1.0], "at least two"),
        ([256, 512], [1.0], "at least two"),
        ([256, 512], [1.0, 0.0], "above 0"),
        ([256, 512], [1.0, float("nan")], "above 0"),
        ([256, 512], [1.0, 0.5], "no longer than small ones"),
    ],
)
def test_what_cannot_be_fitted_is_refused(payloads, seconds, message):
    with pytest.raises(ValueError, match=message):
        fit_alpha_beta(payloads, seconds)


def runs_of(seconds_of, noise=(1.0, 1.0)):
    return [{("all_reduce", size): factor * seconds_of(size) for size in PAYLOADS}
            for factor in noise]  # fmt: skip


def test_held_out_payloads_are_not_fitted_and_judge_the_fit():
    assert not set(TRAINING_BYTES) & set(HELDOUT_BYTES)

    def straight(size):
        return 1e-4 + size / 1e9

    assert fit(runs_of(straight), "all_reduce", 2, "gloo").heldout_worst_error < 1e-6
    bent = runs_of(lambda size: straight(size) * (2.0 if size in HELDOUT_BYTES else 1.0))
    found = fit(bent, "all_reduce", 2, "gloo")
    assert found.latency_s == pytest.approx(1e-4)
    assert found.bandwidth_bytes_per_s == pytest.approx(1e9)
    assert found.heldout_median_error == pytest.approx(0.5)
    assert (found.num_payloads, found.num_heldout) == (8, 7)
    assert not is_within(found)


def test_no_prediction_is_asked_to_be_closer_than_runs_are_to_each_other():
    def bent(size):
        return (1e-4 + size / 1e9) * (1.5 if size in HELDOUT_BYTES else 1.0)

    assert not is_within(fit(runs_of(bent), "all_reduce", 2, "gloo"))
    apart = fit(runs_of(bent, (0.75, 1.25)), "all_reduce", 2, "gloo")
    assert apart.run_to_run == pytest.approx(1.25 / 0.75 - 1)
    assert is_within(apart)


def test_every_operation_is_timed_at_every_payload_and_takes_time():
    timings = time_collectives(3, [100, 4096], calls=3)
    # Rounded up to whole elements that divide among three ranks.
    assert [timing[:2] for timing in timings] == [
        (operation, payload) for operation in OPERATIONS for payload in (108, 4104)
    ]
    assert all(len(timing.seconds) == 3 and min(timing.seconds) > 0 for timing in timings)
    with pytest.raises(ValueError, match="ranks=1 must be at least 2"):
        time_collectives(1, [100], calls=1)


def test_the_node_file_keeps_models_and_collectives_side_by_side(tmp_path, capsys):
    path = tmp_path / "node.yaml"
    assert main(["calibrate", "ranks=2", "repeats=1", f"out={path}"]) == 0
    assert "held-out error" in capsys.readouterr().out
    first = read_node(path).calibration
    assert set(first.collectives) == {f"{operation}_2" for operation in OPERATIONS}
    one = first.collectives["all_reduce_2"]
    assert (one.operation, one.ranks, one.backend) == ("all_reduce", 2, "gloo")
    assert one.max_payload_bytes == max(TRAINING_BYTES)
    assert main(["calibrate", "weights=random", "repeats=1", f"out={path}"]) == 0
    second = read_node(path).calibration
    assert second.collectives == first.collectives
    assert set(second.models) == {"tiny_llama"}
    calibrate.store({}, {"all_reduce_9": one}, "cpu", path)
    third = read_node(path).calibration
    assert third.models == second.models
    assert set(third.collectives) == {*first.collectives, "all_reduce_9"}


def test_impossible_ranks_are_refused(tmp_path, capsys):
    path = tmp_path / "node.yaml"
    assert main(["calibrate", "ranks=0", f"out={path}"]) == 2
    assert "ranks=0 must be at least 1" in capsys.readouterr().err
    assert not path.exists()
