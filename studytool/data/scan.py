"""Walking through all volumes of a dataset once, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from studytool.data.dataset import Dataset

Array = np.ndarray[Any, Any]
OnProgress = Callable[[int, int], None]

_CHUNK_BYTES = 32 * 1024 * 1024


def scan(
    dataset: Dataset, rows: Array | None = None, *, on_progress: OnProgress | None = None
) -> Iterator[tuple[Array, Array]]:
    """Yield row numbers [n] and their volumes [n, D, H, W] as stored, in the order of `rows` (default: all).

    The volumes are a buffer that the next step overwrites. `on_progress(done, total)` counts volumes.

    Raises:
        DataError: a row group that has to be decoded is damaged.
    """
    wanted = np.arange(len(dataset)) if rows is None else rows
    manifest = dataset.manifest
    size = max(1, min(len(wanted), _CHUNK_BYTES // manifest.volume_bytes))
    buffer = np.empty((size, *manifest.shape_dhw), manifest.dtype)
    for first in range(0, len(wanted), size):
        chunk = wanted[first : first + size]
        dataset.gather(chunk, buffer[: len(chunk)])
        yield chunk, buffer[: len(chunk)]
        if on_progress is not None:
            on_progress(first + len(chunk), len(wanted))
