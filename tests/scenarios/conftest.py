import pytest

from scenarios import folders
from scenarios.cli import main


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder to run in, and no folders of the user's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folders, "OWN", tmp_path / "no_such_folder")
    monkeypatch.delenv(folders.VARIABLE, raising=False)
    return tmp_path


@pytest.fixture
def diptych(workplace, capfd):
    """Run a command line in this process: (exit code, output, errors)."""

    def run(*arguments):
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        out, errors = capfd.readouterr()
        return code, out, errors

    return run
