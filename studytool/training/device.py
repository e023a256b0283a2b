"""What a trial runs on: the device, its number formats and memory layout, and leaving it clean for the next trial."""

from __future__ import annotations

import ctypes
import gc
import platform
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from studytool.errors import TrainingError
from studytool.results import DeviceInfo
from studytool.settings import TrainSettings

Precision = Literal["float32", "bfloat16", "float16"]
RECOMPILE_LIMIT = 64
"""Combinations of a shape and of what is frozen that are compiled; further ones would run uncompiled."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str | None) -> torch.device:
    """The device called `name` ("cpu", "cuda", "cuda:1"); for None the current GPU where there is one, else the CPU.

    Raises:
        TrainingError: there is no such device here.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise TrainingError(f"device {name!r}: there is no such device; use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise TrainingError(f"device {name!r}: studytool trains on cpu, cuda or cuda:N")
    if device.type == "cuda":
        found = torch.cuda.device_count()
        if (device.index or 0) >= found:
            raise TrainingError(f"device {name!r}: torch finds {found} CUDA devices here; use cpu, or check the driver")
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    return device


def describe_device(device: torch.device, trials_side_by_side: int) -> DeviceInfo:
    """The device as the record names it."""
    if device.type == "cuda":
        return DeviceInfo("cuda", torch.cuda.get_device_name(device), trials_side_by_side)
    return DeviceInfo("cpu", f"{cpu_name()}, {torch.get_num_threads()} threads", trials_side_by_side)


def choose_precision(setting: str, device: torch.device) -> Precision:
    """The number format that "auto" means on this device: bfloat16 where a GPU computes it itself, else float32."""
    if setting != "auto":
        return setting  # type: ignore[return-value]
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    return "float32"


def choose_memory_format(setting: str, model: nn.Module, device: torch.device) -> torch.memory_format:
    """How volumes lie in memory: channels last by choice and, with "auto", for convolutions on a GPU.

    A GPU's tensor cores want channels last (not measured here); attention would only copy back and forth. A CPU is as
    fast or slower with it: a step of R3D-18 and R(2+1)D-18 took 0.96 to 1.28 times as long (oneDNN of torch 2.15, sides
    16 and 32, one and two threads of an Intel Xeon).
    """
    if setting == "auto":
        convolved = sum(p.numel() for m in model.modules() if isinstance(m, nn.Conv3d) for p in m.parameters())
        mostly = 2 * convolved > sum(p.numel() for p in model.parameters())
        setting = "on" if mostly and device.type == "cuda" else "off"
    return torch.channels_last_3d if setting == "on" else torch.contiguous_format


def choose_forward(settings: TrainSettings, model: nn.Module, device: torch.device) -> Callable[..., torch.Tensor]:
    """The forward pass of training: the model itself or what `torch.compile` makes of it as it is called.

    The model stays as it is, with the names of its weights. Each shape is compiled for itself: what is compiled for
    several shapes depends on which came first, so that a resumed trial would differ in the last bits.

    "graphs" has Inductor record the kernels of a step as CUDA graphs ("reduce-overhead"), which spares the CPU their
    launches. Inductor records a graph for every shape and knows what a network mutates, while
    `torch.cuda.make_graphed_callables` would be for one shape, and its warm-up would move the running statistics. Not
    measured on a GPU.
    """
    if not settings.is_compiled:
        return model
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    graphs = settings.compile == "graphs" and can_be_graphs(settings, model, device)
    forward: Callable[..., torch.Tensor] = torch.compile(
        model, dynamic=False, mode="reduce-overhead" if graphs else None
    )
    return forward


def can_be_graphs(settings: TrainSettings, model: nn.Module, device: torch.device) -> bool:
    """Whether CUDA graphs compute what the network does; else "graphs" is "on". It depends on no measurement.

    A graph's output is overwritten by the next replay: gradients of several parts cannot add up (`accumulate`). What
    is trained is recorded with it: it cannot change (gradual freezing). Random layers are left out, as an epoch begins
    with a seed of its own, and nobody has compared what a replay makes of it.
    """
    freezing = getattr(model, "freezing", None)
    random = [m for m in model.modules() if re.search("drop|stochastic", type(m).__name__.lower())]
    return (
        device.type == "cuda"
        and settings.accumulate == 1
        and (freezing is None or freezing.rule != "gradual")
        and not any(getattr(module, "p", getattr(module, "drop_prob", None)) != 0.0 for module in random)
    )


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within the block torch's global generators (dropout, stochastic depth) start at `seed`; afterwards as before."""
    with torch.random.fork_rng(devices=[device.index] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reuse_memory(setting: str, device: torch.device) -> None:
    """With "auto", have the C library keep what a trial on a CPU frees for its next step.

    Otherwise every tensor above 32 MiB gets fresh pages from the kernel in every step, zeroed and mapped one by one. So
    a process holds its peak, which may be higher by a third as the heap gets holes, until `release_memory`. Only glibc
    has these options (mallopt(3)), and torch allocates with it. No result depends on them.
    """
    global _memory_is_reused
    reuse = setting == "auto" and device.type == "cpu"
    if reuse == _memory_is_reused or not _has_glibc():
        return
    options = _REUSED if reuse else _LIKE_GLIBC
    for option, value in options.items():
        ctypes.CDLL(None).mallopt(option, value)
    _memory_is_reused = reuse


_memory_is_reused = False
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_REUSED = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}
_LIKE_GLIBC = {_MMAP_MAX: 65_536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}
"""What glibc comes to by itself in a process that has allocated and freed large blocks."""


def _has_glibc() -> bool:
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


def release_memory(device: torch.device, *, compiled: bool = False) -> None:
    """Give back what a finished trial held, so that the next one in this process starts clean."""
    if compiled:
        torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if _has_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def cpu_name() -> str:
    """The processor's model; where the system does not tell, its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.machine()
