"""What the machine itself reports: peak memory and energy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import torch

GIB = 2**30


class PeakMemory:
    """The most memory a trial held at once, from the moment this object is made.

    On a GPU it is what torch allocated on the device. On the CPU it is the process's resident memory above its start;
    it includes the part of the dataset that is mapped in. Linux keeps the highest value itself; elsewhere it is
    the highest of those seen by `sample`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept_by_system = False
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._start = 0
        else:
            self._kept_by_system = _reset_peak_resident()
            self._start = psutil.Process().memory_info().rss
        self._highest = self._start

    def sample(self) -> None:
        """Look at the memory in use now; called at the end of every phase."""
        if self._device.type == "cuda":
            now = torch.cuda.max_memory_allocated(self._device)
        else:
            now = _peak_resident() if self._kept_by_system else psutil.Process().memory_info().rss
        self._highest = max(self._highest, now)

    @property
    def gib(self) -> float:
        """The peak so far in GiB."""
        return (self._highest - self._start) / GIB


def energy_reader(device: torch.device) -> Callable[[], float] | None:
    """A function that reads the device's energy counter in joules (NVML); None where nothing measures it."""
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ModuleNotFoundError:
        return None
    try:
        pynvml.nvmlInit()
        # By its UUID, since CUDA_VISIBLE_DEVICES renumbers torch's devices but not NVML's.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None

    def joules() -> float:
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000.0

    return joules


def _reset_peak_resident() -> bool:
    """Make Linux forget the process's highest resident memory so far (man 5 proc, clear_refs); False if it cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _peak_resident() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return psutil.Process().memory_info().rss
