"""Looking at a machine itself: Python, packages, GPUs, memory, disk and clock."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from studytool.doctor.finding import CLOCK_TOLERANCE_SECONDS, GB, SET_CLOCK, Finding, room_finding

LEAST_SHARED_MEMORY = 1 * GB
DRIVER_FOR_CUDA_13 = 580


def look_at_python() -> Iterable[Finding]:
    """Whether Python is of a version the project allows."""
    from packaging.specifiers import SpecifierSet

    version = platform.python_version()
    allowed = importlib.metadata.metadata("studytool")["Requires-Python"] or ""
    if version in SpecifierSet(allowed):
        yield Finding("ok", "python", version)
    else:
        yield Finding("fail", "python", f"{version}, not {allowed}", "make another: `uv venv --python 3.11`")


def look_at_packages() -> Iterable[Finding]:
    """Whether everything the project needs is installed."""
    from packaging.requirements import Requirement

    wrong = []
    needed = [Requirement(text) for text in importlib.metadata.requires("studytool") or ()]
    needed = [item for item in needed if item.marker is None or item.marker.evaluate({"extra": ""})]
    for item in needed:
        try:
            version = importlib.metadata.version(item.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{item.name} is missing")
            continue
        if version not in item.specifier:
            wrong.append(f"{item.name} {version} is not {item.specifier}")
    if wrong:
        yield Finding("fail", "packages", ", ".join(wrong), "in the copy of the project: `uv pip install -e .`")
    else:
        yield Finding("ok", "packages", f"studytool {importlib.metadata.version('studytool')} and all it needs")


def look_at_torch() -> Iterable[Finding]:
    """Which torch this is."""
    import torch
    import torchvision

    yield Finding(
        "ok", "torch", f"{torch.__version__}, torchvision {torchvision.__version__}, CUDA {torch.version.cuda}"
    )


def look_at_gpus() -> Iterable[Finding]:
    """The GPUs, and what is free of their memory."""
    import torch

    names = _gpus_of_the_driver()
    if not torch.cuda.is_available():
        if names is None:
            yield Finding("warn", "gpu", "none: trials train on the CPU", "that is slow, else nothing is wrong")
        else:
            driver, count = names
            yield Finding(
                "fail",
                "gpu",
                f"the driver ({driver}) has {count} GPUs, torch's CUDA {torch.version.cuda} can use none",
                f"install NVIDIA's driver {DRIVER_FOR_CUDA_13} or later, and look at CUDA_VISIBLE_DEVICES",
            )
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found = f"{torch.cuda.get_device_name(index)}, {free / GB:.1f} of {total / GB:.1f} GB free"
        if free < total / 2:
            yield Finding("warn", f"gpu {index}", found, "something else uses it: see `nvidia-smi`")
        else:
            yield Finding("ok", f"gpu {index}", found)


def _gpus_of_the_driver() -> tuple[str, int] | None:
    import pynvml

    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion()), int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return None


def look_at_shared_memory() -> Iterable[Finding]:
    """Room for Ray's object store."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        yield Finding("warn", "/dev/shm", "not here", "Ray uses /tmp instead, which is slower")
        return
    usage = shutil.disk_usage(folder)
    found = f"{usage.free / GB:.1f} of {usage.total / GB:.1f} GB free"
    if usage.free < LEAST_SHARED_MEMORY:
        yield Finding("warn", "/dev/shm", found, "give a container more, as `docker run --shm-size=4g`")
    else:
        yield Finding("ok", "/dev/shm", found)


def look_at_disks() -> Iterable[Finding]:
    """Room for Ray's own files, and in the current folder."""
    import tempfile

    temporary = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    yield room_finding("disk", temporary, "Ray and trials write there; free some, or set RAY_TMPDIR to another")
    here = Path.cwd()
    if here.stat().st_dev != temporary.stat().st_dev:
        yield room_finding("disk", here, "free some")


def look_at_clock() -> Iterable[Finding]:
    """Whether the clock is plausible."""
    now = time.time()
    shown = time.strftime("%Y-%m-%d %H:%M %Z")
    if Path(__file__).stat().st_mtime > now + CLOCK_TOLERANCE_SECONDS:
        yield Finding("fail", "clock", f"{shown} is before this program was installed", SET_CLOCK)
    else:
        yield Finding("ok", "clock", shown)
