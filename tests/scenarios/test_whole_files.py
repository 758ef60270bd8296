"""A report that is interrupted leaves neither half a file nor a file less."""

import pytest
from matplotlib.figure import Figure

from scenarios import perfetto, plot_style
from sim.recorder import Recorder


def write_half(_, path, **__):
    path.write_bytes(b"half")
    raise KeyboardInterrupt


def stop_midway(trace):
    yield {"ph": "M"}
    raise KeyboardInterrupt


@pytest.mark.parametrize("before", [None, "whole"])
def test_an_interrupted_perfetto_trace_changes_nothing(tmp_path, monkeypatch, before):
    path = tmp_path / "trace.perfetto.json"
    if before:
        path.write_text(before)
    monkeypatch.setattr(perfetto, "events", stop_midway)
    with pytest.raises(KeyboardInterrupt):
        perfetto.write(Recorder().trace(), path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ([before] if before else [])


def test_an_interrupted_picture_changes_nothing(tmp_path, monkeypatch):
    path = tmp_path / "timeline.png"
    plot_style.write(Figure(figsize=(1, 1)), path)
    whole = path.read_bytes()
    assert whole.startswith(b"\x89PNG")
    monkeypatch.setattr(Figure, "savefig", write_half)
    with pytest.raises(KeyboardInterrupt):
        plot_style.write(Figure(), path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [whole]
