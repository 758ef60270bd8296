"""A simulated vLLM against recorded ones, where the recordings are: they are not in the project."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data" / "gpu" / "llmservingsim"
TARGETS = {
    "layers": {"tpot_mean_error": 0.02, "e2e_mean_error": 0.03, "ttft_mean_error": 0.10},
    "silicon": {"tpot_mean_error": 0.08, "e2e_mean_error": 0.08},
}


def judge(monkeypatch, capsys, *arguments: str) -> dict[str, float]:
    path = ROOT / "benchmarks" / "real_requests.py"
    spec = importlib.util.spec_from_file_location("real_requests", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    module.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.skipif(not DATA.is_dir(), reason="the recordings are not here")
@pytest.mark.parametrize("gpu", ["RTX4090", "RTXPRO6000"])
def test_with_profiled_layers_a_recorded_run_is_met(monkeypatch, capsys, gpu: str) -> None:
    bench = DATA / "bench" / "examples" / gpu / "Llama-3.1-8B"
    layers = DATA / "profiler" / "perf" / gpu
    found = judge(monkeypatch, capsys, "--bench", str(bench), "--layers", str(layers))
    for line, most in TARGETS["layers"].items():
        assert abs(found[line]) <= most, line
    assert len(found) >= 7


@pytest.mark.skipif(not DATA.is_dir(), reason="the recordings are not here")
def test_with_nvidias_tables_a_recorded_run_is_met(monkeypatch, capsys) -> None:
    pytest.importorskip("aiconfigurator_core")
    bench = DATA / "bench" / "examples" / "RTXPRO6000" / "Llama-3.1-8B"
    found = judge(monkeypatch, capsys, "--bench", str(bench), "--silicon", "rtx_pro_6000")
    for line, most in TARGETS["silicon"].items():
        assert abs(found[line]) <= most, line


@pytest.mark.parametrize(
    ("line", "message"),
    [("{}", "requests.jsonl:1: not a request"), ("nonsense", "requests.jsonl:1: not a request")],
)
def test_a_broken_recording_is_named(
    monkeypatch, capsys, tmp_path: Path, line: str, message: str
) -> None:
    (tmp_path / "requests.jsonl").write_text(line + "\n")
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(SystemExit):
        judge(monkeypatch, capsys, "--bench", str(tmp_path))
    assert message in capsys.readouterr().err
