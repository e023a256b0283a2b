"""`test_predictions.npz`: what a confirm trial said about the test split, kept so that the split is read only once."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from studytool.files import whole_file

PREDICTIONS = "test_predictions.npz"


@dataclass(frozen=True)
class TestPredictions:
    """Probabilities float32 [N, C] of the test split's volumes, their labels int64 [N] and row numbers int64 [N]."""

    __test__ = False  # a name that pytest would take for a test

    probabilities: NDArray[np.float32]
    labels: NDArray[np.int64]
    rows: NDArray[np.int64]


def save_test_predictions(
    folder: Path, probabilities: NDArray[np.float64], labels: NDArray[np.int64], rows: NDArray[np.int64]
) -> None:
    """Write them into a trial's folder, whole or not at all."""
    with whole_file(folder / PREDICTIONS) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, probabilities=probabilities.astype(np.float32), labels=labels, rows=rows)


def read_test_predictions(folder: Path) -> TestPredictions | None:
    """What a trial's folder holds of them; None where there is no such file or it is damaged."""
    try:
        with np.load(folder / PREDICTIONS, allow_pickle=False) as arrays:
            found = TestPredictions(arrays["probabilities"], arrays["labels"], arrays["rows"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    fits = found.probabilities.ndim == 2 and len(found.probabilities) == len(found.labels) == len(found.rows)
    return found if fits else None
