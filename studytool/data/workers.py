"""Work spread over processes, with the results in order and a bounded number of them waiting."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from studytool.errors import DataError

Result = TypeVar("Result")


def results_in_order(
    work: Callable[[int], Result], numbers: Sequence[int], *, workers: int, chunk: int
) -> Iterator[Result]:
    """`work(number)` for all `numbers` in their order, by `workers` processes (in this one if 1).

    `work` travels to each process once and has to be something that can be pickled; at most 2 x `workers` chunks of
    `chunk` results wait to be taken.

    Raises:
        DataError: a process ended without a word, or `work` raised it.
    """
    if workers <= 1:
        yield from map(work, numbers)
        return
    chunks = iter([numbers[start : start + chunk] for start in range(0, len(numbers), chunk)])
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(work,))
    pending: deque[Future[list[Any]]] = deque()
    try:
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


def usable_cores() -> int:
    """Cores this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# What this process is for, if it is a worker.
_work: Callable[[int], Any] | None = None


def _submit_next(pool: ProcessPoolExecutor, pending: deque[Future[list[Any]]], chunks: Iterator[Sequence[int]]) -> None:
    chunk = next(chunks, None)
    if chunk is not None:
        pending.append(pool.submit(_do_chunk, chunk))


def _begin(work: Callable[[int], Any]) -> None:
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


def _do_chunk(numbers: Sequence[int]) -> list[Any]:
    if _work is None:
        raise RuntimeError("the process was started without work")
    return [_work(number) for number in numbers]
