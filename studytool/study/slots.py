"""How many trials run side by side on a machine, and what each of them holds."""

from __future__ import annotations

import os
from dataclasses import dataclass

from studytool.errors import StudytoolError
from studytool.settings import ResourceSettings


@dataclass(frozen=True)
class Slots:
    """How many trials run side by side, and what each holds (CPU cores; GPUs or a share of one)."""

    count: int
    cpu: int
    gpu: float

    @property
    def side_by_side(self) -> int:
        """How many trials share a device: a whole GPU is nobody else's, cores share a machine's memory and clock."""
        return 1 if self.gpu >= 1 else self.count


def share_out(resources: ResourceSettings, cores: int, gpus: float) -> Slots:
    """What the study's resources mean on a machine: "auto" is one GPU a trial where there are any, else one core.

    Raises:
        StudytoolError: a trial asks for more than there is.
    """
    gpu = (1.0 if gpus else 0.0) if resources.gpu == "auto" else float(resources.gpu)
    if gpu > gpus:
        raise StudytoolError(
            f"resources.gpu: a trial asks for {gpu:g} GPUs, this machine has {gpus:g}; set it to 0 or auto"
        )
    by_gpu = int(gpus / gpu + 1e-9) if gpu else cores
    cpu = max(1, cores // by_gpu) if resources.cpu == "auto" else resources.cpu
    if cpu > cores:
        raise StudytoolError(f"resources.cpu: a trial asks for {cpu} cores, this machine has {cores}")
    most = max(1, min(by_gpu, cores // cpu))
    count = most if resources.trials_at_once == "auto" else min(most, resources.trials_at_once)
    return Slots(count=count, cpu=cpu, gpu=gpu)


def gpu_names() -> tuple[str, ...]:
    """The names of the GPUs this process may use; none where there is no driver."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None and not allowed.strip():
        return ()
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        names = [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles]
    except Exception:
        return ()
    return tuple(names if allowed is None else names[: len(allowed.split(","))])
