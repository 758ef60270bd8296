"""Starts the kernel tests under Triton's interpreter, which no process can mix with compiling."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
def test_every_kernel_agrees_with_its_reference_when_interpreted():
    root = Path(__file__).parents[3]
    names = ("test_kernels.py", "test_expert_kernels.py", "test_distributed_kernels.py")
    targets = [str(Path(__file__).with_name(name)) for name in names]
    options = ("-q", "-m", "not gpu", "-p", "no:cacheprovider")
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *targets],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert re.search(r"1\d\d passed", finished.stdout), finished.stdout
    assert "skipped" not in finished.stdout
