"""What want of memory looks like: the errors of torch and Python, and what the kernel has counted."""

from __future__ import annotations

import errno
from pathlib import Path

_WORDS = (
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "cuda error: out of memory",
    "cuda out of memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
)
"""What torch says in a RuntimeError where it has no class for it: its CPU allocator, and CUDA's libraries."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that caused it, says that host or device memory was too small."""
    import torch

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(cause, OSError) and cause.errno == errno.ENOMEM:
            return True
        if isinstance(cause, RuntimeError) and any(words in str(cause).lower() for words in _WORDS):
            return True
        cause = cause.__cause__
    return False


def processes_killed_for_memory(root: Path = Path("/")) -> int:
    """How many processes of this control group the kernel has killed since it began because memory ran out.

    0 where the kernel does not tell. The number of the whole machine (/proc/vmstat) is not taken: a process of
    somebody else may have been the one.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="ascii").split()
    except OSError:
        return 0
    for line in groups:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            events = root / "sys/fs/cgroup" / path.lstrip("/") / "memory.events"
        elif "memory" in controllers.split(","):
            events = root / "sys/fs/cgroup/memory" / path.lstrip("/") / "memory.oom_control"
        else:
            continue
        for candidate in (events, root / "sys/fs/cgroup" / events.name, root / "sys/fs/cgroup/memory" / events.name):
            count = _counted(candidate)
            if count is not None:
                return count
    return 0


def _counted(path: Path) -> int | None:
    try:
        for line in path.read_text(encoding="ascii").splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    except (OSError, ValueError):
        return None
    return None
