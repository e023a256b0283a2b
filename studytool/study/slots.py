"""How many trials run side by side on a machine or a cluster, and what each of them holds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from studytool.errors import StudytoolError
from studytool.settings import ResourceSettings

GIB = 2**30


@dataclass(frozen=True)
class Node:
    """The cores and GPUs of a machine; there are `count` machines like it."""

    cores: int
    gpus: float
    count: int = 1


@dataclass(frozen=True)
class Slots:
    """How many trials run side by side, what each holds (CPU cores; GPUs or a share of one), and the most on a node."""

    count: int
    cpu: int
    gpu: float
    on_one_node: int = 0

    @property
    def side_by_side(self) -> int:
        """How many trials share a device: a whole GPU is nobody else's, cores share a machine's memory and clock."""
        return 1 if self.gpu >= 1 else self.on_one_node or self.count


def share_out(resources: ResourceSettings, cores: int, gpus: float) -> Slots:
    """What the study's resources mean on a machine: "auto" is one GPU a trial where there are any, else one core.

    Raises:
        StudytoolError: a trial asks for more than there is.
    """
    return share_out_over(resources, [Node(cores, gpus)], place="this machine")


def share_out_over(resources: ResourceSettings, nodes: Sequence[Node], *, place: str) -> Slots:
    """The same for several machines; `place` is what the message calls the largest of them.

    Raises:
        StudytoolError: a trial asks for more than any machine has.
    """
    gpus, cores = max(node.gpus for node in nodes), max(node.cores for node in nodes)
    sharing = 1 if resources.trials_per_gpu == "auto" else resources.trials_per_gpu  # before it is measured
    gpu = (1.0 / sharing if gpus else 0.0) if resources.gpu == "auto" else float(resources.gpu)
    if gpu > gpus:
        raise StudytoolError(f"resources.gpu: a trial asks for {gpu:g} GPUs, {place} has {gpus:g}; set it to 0 or auto")
    able = [node for node in nodes if node.cores and node.gpus >= gpu]
    if resources.cpu == "auto":
        cpu = min((max(1, node.cores // _by_gpu(node, gpu)) for node in able), default=1)
    else:
        cpu = resources.cpu
    if not any(node.cores >= cpu for node in able):
        raise StudytoolError(f"resources.cpu: a trial asks for {cpu} cores, {place} has {cores}")
    return count_slots(resources, nodes, cpu=cpu, gpu=gpu)


def count_slots(resources: ResourceSettings, nodes: Sequence[Node], *, cpu: int, gpu: float) -> Slots:
    """How many trials that hold `cpu` cores and `gpu` GPUs run side by side on the nodes."""
    most = [(min(_by_gpu(node, gpu), node.cores // cpu), node.count) for node in nodes if node.gpus >= gpu]
    count = sum(trials * nodes_like_it for trials, nodes_like_it in most)
    if resources.trials_at_once != "auto":
        count = min(count, resources.trials_at_once)
    on_one_node = min(count, max((trials for trials, _ in most), default=0))
    return Slots(count=count, cpu=cpu, gpu=gpu, on_one_node=on_one_node)


def _by_gpu(node: Node, gpu: float) -> int:
    return int(node.gpus / gpu + 1e-9) if gpu else node.cores


def memory_of_trial_gib(slots: Slots) -> float:
    """A trial's share of the memory of this machine's smallest GPU or, where trials hold none, of the machine."""
    if not slots.gpu:
        return float(psutil.virtual_memory().total / GIB / max(1, slots.on_one_node))
    return min((memory for _name, memory in _gpus()), default=0.0) * min(1.0, slots.gpu)


def gpu_names() -> tuple[str, ...]:
    """The names of the GPUs this process may use; none where there is no driver."""
    return tuple(name for name, _memory in _gpus())


def _gpus() -> list[tuple[str, float]]:
    """Name and GiB of memory of the GPUs this process may use."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None and not allowed.strip():
        return []
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        found = [(str(pynvml.nvmlDeviceGetName(h)), pynvml.nvmlDeviceGetMemoryInfo(h).total / GIB) for h in handles]
    except Exception:
        return []
    return found if allowed is None else found[: len(allowed.split(","))]
