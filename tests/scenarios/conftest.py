import pytest

from scenarios import folders
from scenarios.cli import main

FEW = ("workload.num_requests=24", "seeds=[0]")


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty folder to run in, and no folders of the user's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv(folders.VARIABLE, raising=False)
    return tmp_path


@pytest.fixture
def diptych(capfd):
    """Run a command line in this process: (exit code, output, errors)."""

    def run(*arguments):
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        out, errors = capfd.readouterr()
        return code, out, errors

    return run
