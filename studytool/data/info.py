"""What a dataset holds, and whether its classes could be told apart by brightness alone."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from studytool.data.columns import columns
from studytool.data.dataset import Dataset
from studytool.data.leakage import check_leakage
from studytool.data.particles import SPLITS, STORED
from studytool.data.scan import OnProgress, scan
from studytool.data.splits import list_splits, read_split
from studytool.data.voxels import widened
from studytool.errors import DataError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ClassIntensity:
    """Voxel values over all volumes of a class; `deviation` is the standard deviation of all voxels."""

    name: str
    volumes: int
    tomograms: int
    mean: float
    deviation: float
    low: float
    high: float


@dataclass(frozen=True)
class BrightnessScore:
    """The balanced accuracy, in the split `scored`, of the nearest class mean of mean and deviation, from train."""

    scored: str
    balanced_accuracy: float
    chance: float


@dataclass(frozen=True)
class DatasetInfo:
    """What `studytool data info` tells: `splits` by name with volumes per split, and the leak found in it or ""."""

    classes: tuple[ClassIntensity, ...]
    splits: tuple[tuple[str, dict[str, int], str], ...]
    brightness: BrightnessScore | None
    notes: tuple[str, ...]


def dataset_info(dataset: Dataset, *, on_progress: OnProgress | None = None) -> DatasetInfo:
    """Read every volume of a dataset once and say what there is; brightness is judged in the split it is opened with.

    Raises:
        DataError: a volume or a stored split is damaged.
    """
    values = volume_statistics(dataset, on_progress=on_progress)
    classes = tuple(
        _intensity(name, dataset.tomograms[dataset.labels == label], values[dataset.labels == label])
        for label, name in enumerate(dataset.manifest.classes)
    )
    notes = () if not (dataset.tomograms == "").any() else (_UNGROUPED.format(np.sum(dataset.tomograms == "")),)
    return DatasetInfo(classes, tuple(_splits(dataset)), _brightness(dataset, values[:, :2]), notes)


_UNGROUPED = "the tomogram of {} volumes is not known"


def volume_statistics(dataset: Dataset, *, on_progress: OnProgress | None = None) -> NDArray[np.float64]:
    """Mean, standard deviation, smallest and largest voxel of every volume: [N, 4], in bounded memory."""
    values = np.empty((len(dataset), 4))
    for rows, volumes in scan(dataset, on_progress=on_progress):
        flat = widened(volumes).reshape(len(rows), -1)
        values[rows, 0] = flat.mean(axis=1, dtype=np.float64)
        values[rows, 1] = flat.std(axis=1, dtype=np.float64)
        values[rows, 2] = flat.min(axis=1)
        values[rows, 3] = flat.max(axis=1)
    return values


def nearest_mean_accuracy(features: Array, labels: Array, train: Array, scored: Array) -> float:
    """The balanced accuracy over the rows `scored` of a classifier that knows each class's mean over the rows `train`.

    Features [N, F] are scaled to deviation 1 over `train`. Classes without a row in `scored` do not count.
    """
    deviation = features[train].std(axis=0)
    scaled = (features - features[train].mean(axis=0)) / np.where(deviation > 0, deviation, 1)
    known = np.unique(labels[train])
    means = np.stack([scaled[train][labels[train] == label].mean(axis=0) for label in known])
    distances = np.stack([((scaled[scored] - mean) ** 2).sum(axis=1) for mean in means], axis=1)
    right = known[distances.argmin(axis=1)] == labels[scored]
    return float(np.mean([right[labels[scored] == label].mean() for label in np.unique(labels[scored])]))


def info_text(dataset: Dataset, info: DatasetInfo) -> str:
    """The facts for reading, a line each and two small tables."""
    manifest = dataset.manifest
    size = sum(shard.bytes for shard in manifest.shards)
    known = len(set(manifest.tomograms) - {""})
    lines = [
        f"{dataset.folder}: {len(dataset)} volumes of {' x '.join(map(str, manifest.shape_dhw))} voxels of "
        f"{manifest.voxel_size_angstrom:g} Å, {manifest.dtype}, {size / 1e6:.1f} MB in {len(manifest.shards)} shards",
        f"fingerprint {manifest.fingerprint[:12]}; {len(info.classes)} classes, {known or 'no known'} tomograms",
        "",
        *columns(
            ("class", "volumes", "tomograms", "mean", "deviation", "min", "max"),
            [
                (
                    c.name,
                    str(c.volumes),
                    str(c.tomograms or "?"),
                    *(f"{value:.4g}" for value in (c.mean, c.deviation, c.low, c.high)),
                )
                for c in info.classes
            ],
        ),
        "",
        *columns(
            ("split", *SPLITS, "unused", "leaks"),
            [
                (name, *(str(counts.get(split, 0)) for split in (*SPLITS, "")), "yes" if leak else "none found")
                for name, counts, leak in info.splits
            ],
        ),
        "",
    ]
    lines += [f"leak in split {name}: {leak}" for name, _, leak in info.splits if leak]
    lines += [f"note: {note}" for note in info.notes]
    if info.brightness is None:
        lines.append("brightness alone: not judged, as there are no train and val or test splits")
    else:
        score = info.brightness
        lines.append(
            f"brightness alone (mean and deviation of a volume, nearest class mean): balanced accuracy "
            f"{100 * score.balanced_accuracy:.1f}% in {score.scored}, chance is {100 * score.chance:.1f}%"
        )
    return "\n".join(lines) + "\n"


def _intensity(name: str, tomograms: Array, values: Array) -> ClassIntensity:
    if not len(values):
        return ClassIntensity(name, 0, 0, *[math.nan] * 4)
    mean = float(values[:, 0].mean())
    square = float((values[:, 1] ** 2 + values[:, 0] ** 2).mean())
    return ClassIntensity(
        name=name,
        volumes=len(values),
        tomograms=len(set(tomograms.tolist()) - {""}),
        mean=mean,
        deviation=max(0.0, square - mean**2) ** 0.5,
        low=float(values[:, 2].min()),
        high=float(values[:, 3].max()),
    )


def _splits(dataset: Dataset) -> list[tuple[str, dict[str, int], str]]:
    folder, manifest = dataset.folder, dataset.manifest
    found = [(STORED, dataset.stored_splits)]
    for named in list_splits(folder):
        found += [(name, read_split(folder, manifest, name)[0]) for name in named.study_names]
    return [(name, dict(Counter(splits.tolist())), _leak(dataset, splits)) for name, splits in found]


def _leak(dataset: Dataset, splits: Array) -> str:
    try:
        check_leakage(dataset, parts=splits)
    except DataError as error:
        return str(error)
    return ""


def _brightness(dataset: Dataset, features: Array) -> BrightnessScore | None:
    train = np.flatnonzero(dataset.splits == "train")
    for split in ("val", "test"):
        scored = np.flatnonzero(dataset.splits == split)
        if len(train) and len(scored):
            accuracy = nearest_mean_accuracy(features, dataset.labels, train, scored)
            return BrightnessScore(split, accuracy, 1 / len(np.unique(dataset.labels[train])))
    return None
