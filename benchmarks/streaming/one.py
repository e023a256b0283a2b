"""One step in a process of its own, for run.py: `one.py STEP NAME ROOT VOLUMES PASSES SECONDS` -> a line of JSON.

Steps: `write` a format, `warm` and `cold` measure a candidate, `s3` (see from_s3.py).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from candidates import CANDIDATES, FORMATS, Epoch
from common import STEP, Data, Limit, Orders, check_content, costs, descendants, peak_memory, tree_memory

CHECKED_SECONDS = 1.0  # epochs before the timed ones: long enough to see the memory


def main() -> None:
    step, name, root, volumes, passes, seconds = sys.argv[1:]
    data = Data(Path(root), int(volumes))
    if step == "write":
        FORMATS[name].write(data, data.folder(name))
        result: dict[str, Any] = {}
    elif step == "s3":
        from from_s3 import from_s3  # in studytool's environment alone

        result = from_s3(data, data.folder(name), int(passes))
    else:
        result = {"warm": warm, "cold": cold}[step](name, data, int(passes), float(seconds))
    print("RESULT " + json.dumps(result), flush=True)
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
    for process in set(descendants()) - {os.getpid()}:  # what a library left behind
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)
    os._exit(0)


def warm(name: str, data: Data, passes: int, seconds: float) -> dict[str, Any]:
    """Time to the first batch, memory, a checked epoch, then timed passes of whole epochs among those of the limit."""
    candidate = CANDIDATES[name]
    orders = Orders(data)
    importlib.import_module("torch")
    torch_mb = tree_memory()
    for module in candidate.modules:
        importlib.import_module(module)
    started = time.perf_counter()
    epoch = candidate.open(data)
    with peak_memory() as peak:
        first_seconds = _checked_epoch(epoch, orders, candidate.dtype) - started
        _epochs(epoch, orders, CHECKED_SECONDS)
    limit = Limit(data)
    timed = []
    for _ in range(passes):
        limits = [limit.rate() for _ in range(3)]
        with costs() as cost:
            done = _epochs(epoch, orders, seconds)
        limits += [limit.rate() for _ in range(3)]
        timed.append({"volumes": done, "limits": limits, **vars(cost)})
    return {
        "first_seconds": first_seconds,
        "own_mb": peak[0],
        "torch_mb": torch_mb,
        "passes": timed,
        **orders.summary(),
    }


def cold(name: str, data: Data, passes: int, seconds: float) -> dict[str, Any]:  # noqa: ARG001
    """One epoch; run.py has dropped the files from the page cache."""
    candidate = CANDIDATES[name]
    for module in ("torch", *candidate.modules):
        importlib.import_module(module)
    epoch, orders = candidate.open(data), Orders(data)
    started = time.perf_counter()
    done = _epochs(epoch, orders, 0)
    return {"rate": done / (time.perf_counter() - started), **orders.summary()}


def _epochs(epoch: Epoch, orders: Orders, seconds: float) -> int:
    """Whole epochs for so long, at least one; the consumer touches every page of every batch."""
    started, before = time.perf_counter(), len(orders.epochs)
    while len(orders.epochs) == before or time.perf_counter() - started < seconds:
        batches = []
        for volumes, numbers in epoch(len(orders.epochs)):
            float(volumes.reshape(len(numbers), -1)[:, ::STEP].sum())
            batches.append(numbers)
        orders.epochs.append([_array(numbers) for numbers in batches])
    return (len(orders.epochs) - before) * orders.data.count


def _checked_epoch(epoch: Epoch, orders: Orders, dtype: str) -> float:
    """Hold one epoch against what was stored; the time at which its first batch was there."""
    import numpy as np
    import torch

    batches, prints, arrived = [], [], 0.0
    for volumes, numbers in epoch(0):
        arrived = arrived or time.perf_counter()
        assert volumes.dtype == getattr(torch, dtype), volumes.dtype
        assert tuple(volumes.shape) == (len(numbers), 1, 32, 32, 32), volumes.shape
        batches.append(_array(numbers))
        prints.append(volumes.reshape(len(numbers), -1)[:, ::STEP].float().numpy().copy())
    check_content(orders.data, np.concatenate(batches), np.concatenate(prints), dtype)
    orders.epochs.append(batches)
    return arrived


def _array(numbers: Any) -> Any:
    """Of a tensor or an array."""
    return numbers.numpy().copy() if hasattr(numbers, "numpy") else numbers


if __name__ == "__main__":  # libraries' processes import this file again
    main()
