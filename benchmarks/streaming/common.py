"""The data, the machine's limit, accounting and checks. Runs in every environment: needs NumPy alone to be imported."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SIDE, BATCH, CLASSES, BLOCK = 32, 64, 10, 256
VOXELS = SIDE**3
ONE = (1, SIDE, SIDE, SIDE)
STEP = 1024  # every 4 KiB page of float32 is touched and checked
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Data:
    """`count` volumes of noise with a weak blob, float32, in `root`; a volume's number is its label for the peers.

    Classes lie one after the other, as in a folder per class.
    """

    root: Path
    count: int

    @property
    def raw(self) -> Any:
        """All volumes [count, VOXELS], mapped."""
        return np.load(self.root / "raw.npy", mmap_mode="r")

    def folder(self, name: str) -> Path:
        """Where a format lies."""
        return self.root / name

    def class_of(self, numbers: Any) -> Any:
        """The class of volumes."""
        return numbers * CLASSES // self.count

    def blocks(self) -> Iterator[tuple[Any, Any]]:
        """Volumes [n, VOXELS] and their numbers [n], in order."""
        for low in range(0, self.count, BLOCK):
            high = min(self.count, low + BLOCK)
            yield np.array(self.raw[low:high]), np.arange(low, high)

    def samples(self) -> Iterator[tuple[Any, int]]:
        """Volume [1, D, H, W] and its number, in order."""
        for volumes, numbers in self.blocks():
            for volume, number in zip(volumes, numbers.tolist(), strict=True):
                yield volume.reshape(ONE), number

    def make(self) -> None:
        """Write the raw array, unless it is there."""
        self.root.mkdir(parents=True, exist_ok=True)
        if (self.root / "raw.npy").exists() and len(self.raw) == self.count:
            return
        raw = np.lib.format.open_memmap(self.root / "raw.npy", "w+", np.float32, (self.count, VOXELS))
        axis = np.arange(SIDE, dtype=np.float32) - SIDE / 2
        squares = axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2
        blob = 0.2 * np.exp(-squares / 40).reshape(1, VOXELS)
        for low in range(0, self.count, BLOCK):
            rows = raw[low : low + BLOCK]
            rows[:] = np.random.default_rng([20, low]).standard_normal(rows.shape, dtype=np.float32) + blob
        raw.flush()


class Limit:
    """Random gathers of whole volumes, page cache -> one reused tensor, one thread: what the machine can do."""

    def __init__(self, data: Data) -> None:
        import torch

        self._source = data.raw
        self._tensor = torch.zeros(BATCH, VOXELS)
        self._random = np.random.default_rng(0)
        self.rate()  # the pages are mapped now

    def rate(self) -> float:
        """Volumes per second over one epoch."""
        order = self._random.permutation(len(self._source))
        whole = len(order) // BATCH * BATCH
        out = self._tensor.numpy()
        started = time.perf_counter()
        for low in range(0, whole, BATCH):
            np.take(self._source, order[low : low + BATCH], axis=0, out=out, mode="clip")
        return whole / (time.perf_counter() - started)


@dataclass
class Orders:
    """What was delivered: the numbers of each whole epoch's volumes, and how they lay in its batches."""

    data: Data
    epochs: list[list[Any]] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Correlation of stored and delivered order, class mix of the batches, and the jump between neighbours.

        `class_mix` is the mean squared deviation of a class's count in a batch, over its expectation for independent
        draws (hypergeometric): 1 for a true shuffle, above for batches of few classes. `jump` is the mean distance in
        the store between neighbours, over that of a true shuffle.
        """
        count, classes = self.data.count, self.data.class_of(np.arange(self.data.count))
        shares = np.bincount(classes, minlength=CLASSES) / count
        correlations, mixes, jumps = [], [], []
        for batches in self.epochs:
            order = np.concatenate(batches)
            assert np.array_equal(np.sort(order), np.arange(count)), "an epoch has not each volume exactly once"
            correlations.append(np.corrcoef(order, np.arange(count))[0, 1])
            jumps.append(np.abs(np.diff(order)).mean() / (count / 3))
            for batch in batches:
                counts = np.bincount(classes[batch], minlength=CLASSES)
                variance = len(batch) * shares * (1 - shares) * (count - len(batch)) / (count - 1)
                mixes.append(np.mean((counts - len(batch) * shares) ** 2 / variance))
        means = {"correlation": correlations, "class_mix": mixes, "jump": jumps}
        return {name: float(np.mean(values)) for name, values in means.items()}


def check_content(data: Data, numbers: Any, prints: Any, dtype: str) -> None:
    """Every volume of an epoch has its own content; `prints` are each volume's voxels at every STEP."""
    expected = data.raw[:, ::STEP][numbers].astype(dtype).astype(np.float32)
    assert np.array_equal(prints, expected), "volumes differ from those that were stored"


@dataclass
class Cost:
    """Seconds, CPU seconds of this process and all below it, and the cores that others used meanwhile."""

    wall: float = 0.0
    cpu: float = 0.0
    others: float = 0.0


@contextmanager
def costs() -> Iterator[Cost]:
    """What the work inside costs, known when it is done."""
    cost = Cost()
    cpu, busy, started = _tree_cpu(), _busy(), time.perf_counter()
    yield cost
    cost.wall = time.perf_counter() - started
    busy = _busy() - busy
    cost.cpu = _tree_cpu() - cpu
    cost.others = max(0.0, busy - cost.cpu) / cost.wall


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """The most anonymous and shared memory (MB) that this process and all below it had; one value when done."""
    peak, done = [tree_memory()], threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            peak[0] = max(peak[0], tree_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def drop_from_cache(folder: Path) -> None:
    """Drop the pages of this folder's files, and no others, from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def descendants() -> dict[int, int]:
    """This process and all below it, with their CPU ticks, those of children that ended included."""
    children: dict[int, list[int]] = {}
    ticks = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue  # it ended meanwhile
            children.setdefault(int(fields[1]), []).append(int(folder.name))
            ticks[int(folder.name)] = sum(map(int, fields[11:15]))
    found, todo = {}, [os.getpid()]
    while todo:
        process = todo.pop()
        found[process] = ticks[process]
        todo += children.get(process, [])
    return found


def _tree_cpu() -> float:
    return sum(descendants().values()) / _TICKS


def tree_memory() -> float:
    """MB of anonymous and shared memory of this process and all below it."""
    kilobytes = 0
    for process in descendants():
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        kilobytes += sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return kilobytes / 1e3


def _busy() -> float:
    """Busy CPU seconds of the whole machine so far, stolen ones included."""
    ticks = list(map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9]))
    return (sum(ticks) - ticks[3] - ticks[4]) / _TICKS
