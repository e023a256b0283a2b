"""What a result was made with: versions, machine and code, as short texts that MLflow can filter by."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

_PACKAGES = ("studytool", "torch", "torchvision", "pytorchvideo", "ray", "optuna", "mlflow", "pyarrow", "numpy")


def describe_environment(command: Sequence[str]) -> dict[str, str]:
    """Versions of Python and of what decides results, the machine, the commit of the code, and the command."""
    versions = {f"version.{name}": metadata.version(name) for name in _PACKAGES}
    return {
        "version.python": platform.python_version(),
        **versions,
        "machine.system": f"{platform.system()} {platform.machine()}",
        "machine.processor": _processor(),
        "code.commit": _commit(),
        "command": " ".join(command) or sys.executable,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _commit() -> str:
    """The commit of the checkout that the code runs from, with `+changes` if files differ; "release" if installed."""
    here = Path(__file__).resolve().parent
    try:
        commit = _git(here, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(here, "status", "--porcelain", "--", str(here.parent)) else "")
    except (OSError, subprocess.CalledProcessError):
        return "release"


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()
