"""How well probabilities match labels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from studytool.results import Scores


def score(probabilities: NDArray[np.float64], labels: NDArray[np.int64], num_classes: int) -> Scores:
    """Score class probabilities [N, num_classes] (rows add up to 1) against labels [N] in 0 … num_classes - 1.

    The loss is the mean of -log(probability of the label), in nats, without label smoothing; a probability of 0 counts
    as the smallest normal number, so it stays finite. Balanced accuracy is the mean recall over the classes that
    occur, macro F1 the mean over those that occur or are predicted: the values of scikit-learn, whose import alone
    would take longer than a small trial's epoch. `macro_auc` is None where
    fewer than two classes occur. No value is ever NaN.

    Raises:
        ValueError: no volumes, shapes that do not fit, or values that are not finite.
    """
    if probabilities.shape != (len(labels), num_classes) or len(labels) == 0:
        raise ValueError(
            f"probabilities {probabilities.shape} do not fit {len(labels)} labels of {num_classes} classes"
        )
    if not np.isfinite(probabilities).all():
        raise ValueError("probabilities are not finite")
    predictions = probabilities.argmax(axis=1)
    pairs = np.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    confusion = pairs.reshape(num_classes, num_classes)
    hits, occurring, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    of_label = np.take_along_axis(probabilities, labels[:, None], axis=1)[:, 0]
    met = occurring + predicted > 0
    return Scores(
        count=len(labels),
        loss=float(-np.log(np.maximum(of_label, np.finfo(np.float64).tiny)).mean()),
        accuracy=float(hits.sum() / len(labels)),
        balanced_accuracy=float((hits[occurring > 0] / occurring[occurring > 0]).mean()),
        macro_f1=float((2 * hits[met] / (occurring + predicted)[met]).mean()),
        macro_auc=_macro_auc(probabilities, labels),
        confusion=tuple(tuple(int(count) for count in row) for row in confusion),
    )


def _macro_auc(probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> float | None:
    classes = np.unique(labels)
    if len(classes) < 2:
        return None
    return float(np.mean([_auc(probabilities[:, c], labels == c) for c in classes]))


def _auc(values: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """The share of (positive, negative) pairs in the right order, ties counting half: Mann-Whitney's U over pairs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    n = int(positive.sum())
    u = ranks[positive].sum() - n * (n + 1) / 2
    return float(u / (n * (len(values) - n)))
