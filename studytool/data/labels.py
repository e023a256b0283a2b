"""How many labels a trial learns from: a draw of training volumes for label fractions and few-shot arms."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from studytool.data.dataset import Dataset
from studytool.errors import DataError
from studytool.seeds import derive_seed
from studytool.settings import InputSettings

Rows = NDArray[np.int64]


def training_rows(dataset: Dataset, settings: InputSettings, seed: int) -> Rows:
    """The rows of the training split that a trial with this seed learns from, rising; see `draw`.

    The other splits are never drawn from, so that no trained volume can be one of theirs.

    Raises:
        DataError: there is no training split, or a class has fewer volumes in it than `labels_per_class`.
    """
    rows = dataset.rows("train")
    labels = dataset.labels[rows]
    wanted = settings.labels_per_class
    if wanted is not None:
        counts = np.bincount(labels, minlength=len(dataset.manifest.classes)).tolist()
        fewest = min(counts)
        if fewest < wanted:
            raise DataError(
                f"{dataset.folder}: labels_per_class is {wanted}, but {dataset.manifest.classes[counts.index(fewest)]} "
                f"has {fewest} volumes in the train split; ask for at most {fewest}, or leave the class out"
            )
    return rows[draw(labels, per_class=wanted, fraction=settings.label_fraction, seed=seed)]


def draw(labels: Rows, *, per_class: int | None, fraction: float, seed: int) -> Rows:
    """Positions in `labels` [N], rising: so many of each class, or the same fraction of each class, at least one.

    A pure function of its arguments. For one seed the draws are nested: each class has one random order, of which
    every draw takes the first ones, so that 3 of a class are among its 5, and 5% among 25%. For the classes to be
    independent of one another, each has its own order.
    """
    chosen = []
    for label in np.unique(labels).tolist():
        members = np.flatnonzero(labels == label)
        count = max(1, round(fraction * len(members))) if per_class is None else per_class
        if count > len(members):
            raise ValueError(f"{count} of label {label}, which has {len(members)}")
        order = np.random.default_rng(derive_seed(seed, "labels", label)).permutation(len(members))
        chosen.append(members[order[:count]])
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64)
