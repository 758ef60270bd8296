"""A rank that dies, stops or never joins ends the run with its cause within ten seconds."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rank_work import lose, sum_of_ranks, variable
from torch import multiprocessing

from backends import ranks
from backends.heartbeat import wants_processor
from backends.ranks import require_ranks, run_ranks

ROOT = Path(__file__).parents[2]
LIMIT_S = 10.0


class Stopwatch:
    """Seconds from the loss of a rank to the end of the run, start-up of the ranks left out."""

    def __init__(self, monkeypatch):
        self.started_s = None
        listen = ranks._Supervisor._listen

        def note(supervisor, codes):
            if self.started_s is None and len(supervisor._beats) == supervisor._size:
                self.started_s = time.monotonic()
            return listen(supervisor, codes)

        monkeypatch.setattr(ranks._Supervisor, "_listen", note)


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("SIGKILL", ChildProcessError, "rank 1 of 3 was killed by SIGKILL"),
        ("SIGSTOP", ChildProcessError, r"rank 1 of 3 has not beaten for \d+ s; it was stopped"),
        ("leave", ChildProcessError, "rank 1 of 3 left with exit code 7"),
        ("fail", ChildProcessError, "rank 1 of 3 failed with RuntimeError: out of luck"),
        ("raise", ValueError, "tokens=-1 must not be negative"),
    ],
)
def test_a_lost_rank_is_named_and_ends_the_run(how, kind, message, monkeypatch):
    watch = Stopwatch(monkeypatch)
    with pytest.raises(kind, match=message):
        run_ranks(lose, 3, (1, how))
    if watch.started_s is not None:  # None: it was lost before the launcher had heard them all
        assert time.monotonic() - watch.started_s < LIMIT_S
    assert multiprocessing.active_children() == []


def sleep_instead_of_joining(rank, size):
    raise AssertionError("rank 0 must wait for the others for ever")


def test_a_rank_that_never_joins_is_named(monkeypatch):
    """Its process is there, but it never gets as far as its first beat."""
    start = ranks.start_processes

    def start_and_stop_one(*arguments, **options):
        context = start(*arguments, **options)
        os.kill(context.processes[1].pid, signal.SIGSTOP)
        return context

    monkeypatch.setattr(ranks, "start_processes", start_and_stop_one)
    first_join_s = []
    late = ranks._Supervisor._is_late

    def note(supervisor, now_s):
        if supervisor._first_join_s is not None:
            first_join_s.append(supervisor._first_join_s)
        return late(supervisor, now_s)

    monkeypatch.setattr(ranks._Supervisor, "_is_late", note)
    with pytest.raises(ChildProcessError, match="rank 1 of 2 never joined"):
        run_ranks(sleep_instead_of_joining, 2)
    assert time.monotonic() - first_join_s[0] < LIMIT_S + 1


def test_a_busy_process_wants_a_processor_and_a_stopped_one_does_not():
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        assert wants_processor(busy.pid)
        busy.send_signal(signal.SIGSTOP)
        os.waitpid(busy.pid, os.WUNTRACED)
        assert not wants_processor(busy.pid)
    finally:
        busy.kill()
        busy.wait()
    assert not wants_processor(busy.pid)


def test_what_ranks_return_comes_back_by_rank():
    assert run_ranks(sum_of_ranks, 3) == [3.0, 3.0, 3.0]


def test_impossible_numbers_of_ranks_are_refused():
    with pytest.raises(ValueError, match="ranks=0 must be at least 1"):
        run_ranks(sum_of_ranks, 0)
    have = torch.cuda.device_count()
    with pytest.raises(ValueError, match=f"need a GPU each, and torch sees {have}"):
        require_ranks(have + 1, "cuda")


TORCHRUN = r"""
import sys; sys.path.insert(0, "tests/backends")
from rank_work import {work} as work
from backends.ranks import run_under_torchrun
returned = run_under_torchrun(work, {arguments})
sys.stdout.write(f"returned {{returned}}\n")
"""


def torchrun(tmp_path, work, arguments):
    script = tmp_path / "script.py"
    script.write_text(TORCHRUN.format(work=work, arguments=arguments))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, str(script)], cwd=ROOT, capture_output=True, text=True, check=False,
        timeout=100, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip


def test_torchrun_starts_the_same_work(tmp_path):
    done = torchrun(tmp_path, "sum_of_ranks", ())
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("returned 1.0") == 2


def test_ranks_under_torchrun_watch_each_other(tmp_path):
    done = torchrun(tmp_path, "stop_for_a_while", ())
    assert done.returncode != 0
    assert "rank 1 of 2 has not beaten for 8 s" in done.stderr


def test_without_torchrun_the_missing_variables_are_named(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not in"):
        ranks.run_under_torchrun(sum_of_ranks)


ORPHANS = r"""
import sys; sys.path.insert(0, "tests/backends")
from rank_work import wait_for_ever
from backends.ranks import run_ranks
if __name__ == "__main__":
    run_ranks(wait_for_ever, 2, (sys.argv[1],))
"""


def test_ranks_end_when_their_launcher_is_killed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(ORPHANS)
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT}/tests/backends", "PATH": "/usr/bin:/bin"}
    launcher = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], cwd=ROOT, env=environment,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while len(started := list(tmp_path.glob("pid-*"))) < 2:
        assert launcher.poll() is None, "the launcher ended by itself"
        time.sleep(0.1)
    launcher.kill()
    launcher.wait()
    pids = [int(path.name.removeprefix("pid-")) for path in started]
    deadline_s = time.monotonic() + LIMIT_S
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline_s, "a rank outlived its launcher"
        time.sleep(0.1)


def is_alive(pid):
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone, or gone while it was read
        return False


def test_ranks_have_the_environment_of_their_launcher_at_their_start(monkeypatch):
    for value in ("one", "two"):
        monkeypatch.setenv("DIPTYCH_TEST", value)
        assert run_ranks(variable, 2, ("DIPTYCH_TEST",)) == [value, value]
    monkeypatch.delenv("DIPTYCH_TEST")
    assert run_ranks(variable, 1, ("DIPTYCH_TEST",)) == [None]
