"""Where a figure comes from: commit, versions, machine. Kept apart from what must be repeatable."""

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("diptych", "simpy", "numpy", "torch", "triton", "transformers")


def provenance() -> dict[str, str]:
    """Commit, package versions, Python and machine as text."""
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "machine": machine(),
        **{name: _version(name) for name in PACKAGES},
    }


@cache
def commit() -> str:
    """The commit of the source tree, `+` where it was changed; `release` outside git."""
    folder = Path(__file__).parent
    try:
        text = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            cwd=folder, capture_output=True, text=True, check=True, timeout=10,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "release"
    return text.strip()


def machine() -> str:
    """Processor, cores and system."""
    return f"{processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"


def processor() -> str:
    """Name of the processor as the system states it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown processor"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
