"""Shards -> shuffled batches: volumes are gathered ahead by a thread into a ring of reused buffers.

Loader processes would cost twenty times the gather, as every batch would be copied into fresh shared memory; a thread
does not, because the copies of the gather run without Python's lock.
"""

from __future__ import annotations

import resource
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from studytool.data.dataset import Dataset
from studytool.seeds import derive_seed

if TYPE_CHECKING:
    import torch

Rows = np.ndarray[Any, np.dtype[np.int64]]

RING = 2  # batches: the one in use and the one after it; more would not stay in the processor's cache
PINNED_RING = 4  # and the one before, which may still be copied to a device, and one more ahead
ANNOUNCED = 4  # batches announced to the kernel before they are gathered
_ANNOUNCE_AFTER_READING = 8  # batches; once nothing is read from the disk any more, announcing only costs time


def epoch_order(num_rows: int, *, seed: int, epoch: int, worker: int = 0, num_workers: int = 1) -> Rows:
    """The order of an epoch: a permutation of `range(num_rows)` that depends on `seed` and `epoch` alone.

    With several workers each gets its part of that permutation: together every row exactly once.
    """
    order = np.random.default_rng(derive_seed(seed, "order", epoch)).permutation(num_rows)
    return order[worker::num_workers]


@dataclass(frozen=True)
class Batch:
    """`volumes_B1DHW` in the stored dtype and `labels_B` int64 (tensors), and `rows_B`, their rows in the dataset.

    The tensors are buffers of a ring: they stay valid until the next batch is asked for, not longer.
    """

    volumes_B1DHW: torch.Tensor
    labels_B: torch.Tensor
    rows_B: Rows

    def __len__(self) -> int:
        return len(self.rows_B)


class Stream:
    """Batches of the volumes `rows` of a dataset, each row exactly once an epoch; the last batch may be smaller.

    `len(stream)` is the number of batches of an epoch. With `shuffle` the order is `epoch_order`, else that of `rows`.
    With `pin_memory` (needs CUDA) batches may be copied with `non_blocking=True` on the current CUDA stream: a buffer
    is filled again only when the device is done with what had been queued by the time it was given back.
    """

    def __init__(
        self, dataset: Dataset, rows: Rows, *, batch_size: int, seed: int, shuffle: bool, pin_memory: bool = False
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size has to be at least 1, found {batch_size}")
        self._dataset = dataset
        self._rows = np.asarray(rows, dtype=np.int64)
        self._batch_size = min(batch_size, max(1, len(self._rows)))
        self._seed = seed
        self._shuffle = shuffle
        self._pin_memory = pin_memory
        self._idle: list[_Slot] = []
        self._announce_for = _ANNOUNCE_AFTER_READING

    def __len__(self) -> int:
        return -(-len(self._rows) // self._batch_size)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """Yield the batches of epoch `epoch` from number `start_batch` on, the same ones whenever it is called."""
        rows = self._rows
        if self._shuffle:
            rows = rows[epoch_order(len(rows), seed=self._seed, epoch=epoch)]
        batches = [rows[i : i + self._batch_size] for i in range(0, len(rows), self._batch_size)][start_batch:]
        ring, kept = (PINNED_RING, 1) if self._pin_memory else (RING, 0)
        slots = [self._idle.pop() if self._idle else self._new_slot() for _ in range(min(ring, len(batches)))]
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="studytool-gather")
        pending: deque[Future[Batch]] = deque()
        try:
            for number in range(len(slots)):
                pending.append(pool.submit(self._fill, slots[number], batches, number))
            for number in range(len(batches)):
                yield pending.popleft().result()
                # the consumer asks for batch number + 1: this one, or with copies under way the one before, is free
                following = number - kept + len(slots)
                if number >= kept and following < len(batches):
                    slot = slots[following % len(slots)]
                    slot.release()
                    pending.append(pool.submit(self._fill, slot, batches, following))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for slot in slots:
                slot.release()
            self._idle.extend(slots)

    def _fill(self, slot: _Slot, batches: list[Rows], number: int) -> Batch:
        rows = batches[number]
        read_before = _reads()
        if self._announce_for > 0:
            for ahead in batches[:ANNOUNCED] if number == 0 else batches[number + ANNOUNCED - 1 : number + ANNOUNCED]:
                self._dataset.announce(ahead)
        slot.wait()
        volumes, labels = slot.volumes[: len(rows)], slot.labels[: len(rows)]
        self._dataset.gather(rows, volumes)
        labels.numpy()[:] = self._dataset.labels[rows]
        self._announce_for = _ANNOUNCE_AFTER_READING if _reads() > read_before else self._announce_for - 1
        return Batch(volumes, labels, rows)

    def _new_slot(self) -> _Slot:
        import torch

        manifest = self._dataset.manifest
        dtype = {"float16": torch.float16, "float32": torch.float32, "uint8": torch.uint8}[manifest.dtype]
        shape = (self._batch_size, 1, *manifest.shape_dhw)
        # zeros, not empty: the pages are there before the first gather
        volumes = torch.zeros(shape, dtype=dtype, pin_memory=self._pin_memory)
        labels = torch.zeros(self._batch_size, dtype=torch.int64, pin_memory=self._pin_memory)
        return _Slot(volumes, labels)


def _reads() -> int:
    """Blocks read from a disk for this thread, and pages it had to wait for."""
    usage = resource.getrusage(resource.RUSAGE_THREAD)
    return usage.ru_inblock + usage.ru_majflt


class _Slot:
    """One buffer of the ring, with the mark in the device's queue after which it is free."""

    def __init__(self, volumes: torch.Tensor, labels: torch.Tensor) -> None:
        self.volumes = volumes
        self.labels = labels
        self._last_use: torch.cuda.Event | None = None

    def release(self) -> None:
        """The consumer has queued all that it does with the buffer."""
        if self.volumes.is_pinned():
            import torch

            self._last_use = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._last_use.record()

    def wait(self) -> None:
        """Wait until the device is done with the buffer."""
        if self._last_use is not None:
            self._last_use.synchronize()
            self._last_use = None
