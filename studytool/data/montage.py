"""A picture of a dataset: central slices of some volumes of each class."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from studytool.data.shards import Dataset
from studytool.data.voxels import widened
from studytool.errors import DataError
from studytool.files import whole_file
from studytool.seeds import derive_seed

SLICES = ("z", "y", "x")
MAX_PER_CLASS, MAX_CLASSES = 50, 400


def write_montage(dataset: Dataset, path: Path, *, per_class: int = 4, seed: int = 0) -> None:
    """Write a PNG with a row per class: of `per_class` volumes, drawn by `seed`, the middle slice across z, y and x.

    Each slice is shown in grey from its volume's 1st to its 99th percentile.

    Raises:
        DataError: there would be more slices than fit into a picture.
    """
    from matplotlib.figure import Figure

    classes = dataset.manifest.classes
    if not (1 <= per_class <= MAX_PER_CLASS and len(classes) <= MAX_CLASSES):
        raise DataError(
            f"{path}: {per_class} volumes of each of {len(classes)} classes; a picture takes 1 to {MAX_PER_CLASS} "
            f"of at most {MAX_CLASSES}"
        )
    figure = Figure(figsize=(1.1 * 3 * per_class + 1.8, 1.1 * len(classes) + 0.5), layout="constrained")
    axes = figure.subplots(len(classes), 3 * per_class, squeeze=False)
    for label, name in enumerate(classes):
        rng = np.random.default_rng(derive_seed(seed, "montage", name))
        rows = np.sort(rng.permutation(np.flatnonzero(dataset.labels == label))[:per_class])
        volumes = np.zeros((len(rows), *dataset.manifest.shape_dhw), dataset.manifest.dtype)
        dataset.gather(rows, volumes)
        without_ticks(axes[label])
        for number, volume in enumerate(widened(volumes)):
            draw_slices(axes[label, 3 * number : 3 * number + 3], volume)
            if label == 0:
                for axis, letter in enumerate(SLICES):
                    axes[label, 3 * number + axis].set_title(f"across {letter}", fontsize=7)
        axes[label, 0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def draw_slices(axes: Iterable[Any], volume_DHW: np.ndarray[Any, Any]) -> None:
    """Draw the middle slices across z, y and x into three axes, in grey from the 1st to the 99th percentile."""
    low, high = np.percentile(volume_DHW, (1, 99))
    for axis, ax in enumerate(axes):
        ax.imshow(volume_DHW.take(volume_DHW.shape[axis] // 2, axis=axis), cmap="gray", vmin=low, vmax=high)


def without_ticks(axes: Iterable[Any]) -> None:
    """Axes that show a picture and no numbers."""
    for ax in axes:
        ax.set_xticks([])
        ax.set_yticks([])
