"""`report`, `compare` and `list`: what they print and draw comes from what was saved."""

import json
from pathlib import Path

import numpy as np
import pytest

from scenarios import perfetto, plots
from scenarios.cli import COMMANDS
from scenarios.compare import changed
from scenarios.saved import load
from scenarios.tables import number, other_table, quantity, with_interval
from sim.plot_data import batch_sizes, counts, legible_window
from sim.result import Figure
from sim.trace import DECODE

FEW = ("workload.num_requests=40", "seeds=[0,1]")


@pytest.fixture
def saved(diptych):
    diptych("run", "-cn", "replica", *FEW, "out=a")
    diptych("run", "-cn", "replica", *FEW, "out=b", "policy/batching=chunked_prefill",
            "workload.rate_per_s=4")  # fmt: skip
    return load(Path("a"))


def test_report_draws_and_writes_a_trace_for_perfetto(diptych, saved):
    code, out, errors = diptych("report", "a")
    assert (code, errors) == (0, "")
    assert "TTFT" in out
    for name in ("timeline.png", "latency.png"):
        assert (saved.folder / name).read_bytes().startswith(b"\x89PNG")
    events = json.loads((saved.folder / "trace.perfetto.json").read_text())["traceEvents"]
    kinds = [event["ph"] for event in events]
    assert kinds.count("X") == saved.trace().num_iterations
    assert kinds.count("b") == kinds.count("e") == 4 * 40
    assert "C" in kinds


def test_slices_of_the_replica_do_not_overlap(saved):
    slices = [event for event in perfetto.events(saved.trace()) if event["ph"] == "X"]
    ends = [event["ts"] + event["dur"] for event in slices]
    # Microseconds are rounded to the nanosecond.
    assert all(end <= event["ts"] + 0.002 for end, event in zip(ends, slices[1:], strict=False))


def test_each_of_several_replicas_is_a_track_of_its_own(diptych):
    diptych("run", "-cn", "routing", "workload.num_requests=60", "seeds=[0]", "out=many")
    code, _, errors = diptych("report", "many")
    assert (code, errors) == (0, "")
    trace = load(Path("many")).trace()
    assert len(trace.routes["request"]) == 60
    found = list(perfetto.events(trace))
    names = {event["args"]["name"] for event in found if event["name"] == "thread_name"}
    assert names == {f"replica {number}: iterations" for number in range(4)}
    for track in range(1, 5):
        bars = [event for event in found if event["ph"] == "X" and event["tid"] == track]
        ends = [event["ts"] + event["dur"] for event in bars]
        assert bars
        assert all(e <= event["ts"] + 0.002 for e, event in zip(ends, bars[1:], strict=False))


def test_the_same_trace_gives_the_same_picture(saved):
    two = load(Path("b")).trace()
    first = plots.two_panels(saved.trace(), two, Path("one.png")).read_bytes()
    assert plots.two_panels(saved.trace(), two, Path("two.png")).read_bytes() == first


def test_counts_begin_and_end_with_nobody(saved):
    found = counts(saved.trace())
    for steps in (found.running, found.waiting):
        assert steps.value[-1] == 0
        assert steps.value.min() == 0
        assert np.all(np.diff(steps.instant_s) > 0)


def test_batch_sizes_are_those_of_the_running_requests(saved):
    trace = saved.trace()
    sizes = batch_sizes(trace)
    assert len(sizes) == trace.num_iterations
    decoding = trace.iterations["kind"] == DECODE
    running = counts(trace).running
    at = np.searchsorted(running.instant_s, trace.iterations["start_s"], "right") - 1
    assert np.array_equal(sizes[decoding], running.value[at][decoding])


def test_the_legible_window_lies_in_the_run(saved):
    start, stop = legible_window(saved.trace(), 30)
    inside = saved.trace().iterations["start_s"]
    assert ((inside >= start) & (inside < stop)).sum() == 30


def test_report_without_a_trace_says_how_to_get_one(diptych):
    diptych("run", "-cn", "replica", *FEW, "out=c", "save=summary")
    code, _, errors = diptych("report", "c")
    assert code == 2
    assert "save=trace" in errors


def test_compare_says_what_was_changed_and_what_it_changed(diptych, saved):
    code, out, _ = diptych("compare", "a", "b/summary.json")
    assert code == 0
    assert "workload.rate_per_s" in out
    assert "chunked_prefill" in out
    assert "Welch's: they saw other requests" in out
    assert "the largest change is in" in out
    assert "the configuration is the same" in diptych("compare", "a", "a")[1]


def test_compare_pairs_runs_that_saw_the_same_requests(diptych, saved):
    diptych("run", "-cn", "replica", *FEW, "out=c", "policy/batching=static")
    out = diptych("compare", "a", "c")[1]
    assert "paired: both saw the same requests" in out
    rows = [
        line.split() for line in out.splitlines() if line.strip().startswith("kv bytes written")
    ]
    assert rows[0][-1] == "equal"


def test_an_exchanged_gpu_is_one_change():
    one, other = ({"gpu": {"name": name, "peak": {"x": x}}} for name, x in (("a", 1), ("b", 2)))
    assert changed(one, other) == {"gpu.name": ("a", "b")}


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_summary_is_refused(diptych, saved, text):
    (saved.folder / "summary.json").write_text(text)
    code, _, errors = diptych("report", "a")
    assert code == 2
    assert "run the study again" in errors


def test_a_damaged_trace_is_refused(diptych, saved):
    (saved.folder / "trace" / "runs.parquet").write_bytes(b"nonsense")
    code, _, errors = diptych("report", "a")
    assert code == 2
    assert "runs.parquet" in errors


def test_help_and_no_command_list_the_commands(diptych):
    for arguments, expected in ((["--help"], 0), ([], 2), (["run", "--help"], 0)):
        code, out, _ = diptych(*arguments)
        assert code == expected
        assert all(name in out for name in COMMANDS)


def test_run_without_a_study_lists_them(diptych):
    code, out, _ = diptych("run")
    assert code == 0
    assert "Which batching policy" in out


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ([], ["policy/batching", "continuous", "h100_sxm"]),
        (["batching"], ["chunked_prefill", "token budget"]),
        (["models"], ["llama_3_8b", "8.03 B parameters"]),
        (["gpu"], ["h100_sxm", "hopper, 80.0 GiB"]),
        (["node"], ["a100_80g_x8", "8 x a100_80g over nvlink3"]),
        (["workload"], ["chat", "512 tokens", "gamma"]),
        (["token_routing"], ["skewed", "layer", "recorded", "uniform"]),
        (["expert_balance"], ["replicate_hot", "static", "Expert e in slot e"]),
        (["studies", "link"], ["replica", "NVLink of generation 3"]),
    ],
)
def test_list_describes_what_there_is(diptych, group, expected):
    code, out, errors = diptych("list", *group)
    assert (code, errors) == (0, "")
    assert [part for part in expected if part not in out] == []


def test_hydra_shows_the_composed_study(diptych):
    code, out, _ = diptych("run", "-cn", "replica", "--cfg", "job")
    assert code == 0
    assert "rate_per_s: 8.0" in out
    assert not list(Path().iterdir())


def test_figures_read_well():
    assert [number(value) for value in (0.0, 12345.0, 1234.5, 99.96, 0.00123)] == [
        "0", "12,345", "1,234", "100", "0.00123",
    ]  # fmt: skip
    assert quantity("ttft_p50_s", 0.0284) == "28.4 ms"
    assert quantity("throughput_tokens_per_s", 1020.0) == "1,020 tokens/s"
    assert quantity("slo_share", 0.995) == "99.5 %"
    assert quantity("ttft_p50_s", float("nan")) == "-"
    assert with_interval("e2e_mean_s", Figure(1.25, 0.06)) == "1.25 ± 0.06 s"


def test_figures_that_older_results_lack_are_left_out():
    assert other_table({}).row_count == 0


def test_elastic_instances_have_a_track_each_for_perfetto(diptych):
    diptych("run", "-cn", "loongserve_zipf", "workload.num_requests=12", "out=elastic")
    trace = load(Path("elastic")).trace()
    found = list(perfetto.events(trace))
    slices = [event for event in found if event["ph"] == "X"]
    assert len(slices) == len(trace.members["step"])
    assert {event["tid"] for event in slices} == {1 + at for at in trace.members["instance"]}
    names = [event["args"]["name"] for event in found if event["name"] == "thread_name"]
    assert names == [f"instance {at}" for at in range(4)]
