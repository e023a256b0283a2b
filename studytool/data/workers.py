"""Work spread over processes, with the results in order and a bounded number of them waiting.

Large results do not travel: a process leaves them in a slot of memory that all of them share.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from studytool.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

_SLOTS_FILE = ".slots"


def results_in_order(
    work: Callable[[Item], Result], items: Sequence[Item], *, workers: int, chunk: int = 1
) -> Iterator[Result]:
    """`work(item)` for all `items` in their order, by `workers` processes (in this one if 1).

    While the processes start, which takes most of a second, this one works itself. `work` travels to each process once
    and has to be something that can be pickled; at most 2 x `workers` chunks of `chunk` results wait to be taken.

    Raises:
        DataError: a process ended without a word, or `work` raised it.
    """
    if workers <= 1:
        yield from map(work, items)
        return
    pool = ProcessPoolExecutor(workers, mp_context=_context(work), initializer=_begin, initargs=(work,))
    try:
        started = pool.submit(_do_chunk, ())
        done = 0
        while done < len(items) and not started.done():
            yield work(items[done])
            done += 1
        chunks = iter([items[start : start + chunk] for start in range(done, len(items), chunk)])
        pending: deque[Future[list[Any]]] = deque()
        for _ in range(2 * workers):
            _submit_next(pool, pending, chunks)
        while pending:
            results = pending.popleft().result()
            _submit_next(pool, pending, chunks)
            yield from results
    except BrokenProcessPool as error:
        raise DataError("a worker process ended without a word; is there enough memory? use fewer workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Slots:
    """As many equal arrays as results of `results_in_order` can be in use at a time; item i has `slots[i]`.

    A result stays as it is until the next one is asked for. What is pickled is the name of the file that the processes
    map; with one worker there is none.
    """

    def __init__(self, path: Path | None, shape: tuple[int, ...], dtype: str) -> None:
        self.path = path
        self.shape = shape
        self.dtype = dtype
        self._memory: np.ndarray[Any, Any] | None = np.empty(shape, dtype) if path is None else None

    def __getitem__(self, number: int) -> np.ndarray[Any, Any]:
        if self._memory is None:
            self._memory = np.asarray(np.memmap(str(self.path), self.dtype, mode="r+", shape=self.shape))
        memory: np.ndarray[Any, Any] = self._memory[number % len(self._memory)]
        return memory

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memory": None}


@contextmanager
def shared_slots(folder: Path, shape: tuple[int, ...], dtype: str, *, workers: int) -> Iterator[Slots]:
    """Slots of `shape`, in a hidden file in `folder` for as long as they are needed."""
    path = folder / _SLOTS_FILE
    shape = (2 * workers + 1, *shape)  # 2 x workers wait or are being made, one is in use
    try:
        if workers <= 1:
            yield Slots(None, shape, dtype)
            return
        size = math.prod(shape) * np.dtype(dtype).itemsize
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):  # all of it now, as a disk that is full later would end the process
                os.posix_fallocate(file.fileno(), 0, size)
            file.truncate(size)
        yield Slots(path, shape, dtype)
    finally:
        path.unlink(missing_ok=True)


def usable_cores() -> int:
    """Cores this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# What this process is for, if it is a worker.
_work: Callable[[Any], Any] | None = None


def _context(work: Any) -> Any:
    """How processes start: by forking one that has loaded what they need, and nothing else, where there is such."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    program = ["studytool.cli"] if "studytool.cli" in sys.modules else []
    context.set_forkserver_preload([*program, getattr(work, "__module__", None) or __name__])
    return context


def _submit_next(pool: ProcessPoolExecutor, pending: deque[Future[list[Any]]], chunks: Iterator[Sequence[Any]]) -> None:
    chunk = next(chunks, None)
    if chunk is not None:
        pending.append(pool.submit(_do_chunk, chunk))


def _begin(work: Callable[[Any], Any]) -> None:
    """Prepare a worker process: Ctrl-C is the parent's affair, and without the parent there is nothing to do.

    Its linear algebra uses one thread, as there are as many processes as cores.
    """
    global _work
    _work = work
    threadpool_limits(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do_chunk(items: Sequence[Any]) -> list[Any]:
    if _work is None:
        raise RuntimeError("the process was started without work")
    return [_work(item) for item in items]
