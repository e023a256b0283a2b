from __future__ import annotations

import math

import numpy as np
import pytest

from studytool.results import METRICS
from studytool.training.metrics import score


def test_a_case_worked_out_by_hand():
    probabilities = np.array([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.1, 0.8, 0.1], [0.2, 0.3, 0.5]])
    scores = score(probabilities, np.array([0, 0, 1, 2]), 3)
    assert scores.count == 4
    assert scores.confusion == ((1, 1, 0), (0, 1, 0), (0, 0, 1))
    assert scores.accuracy == 0.75
    assert scores.balanced_accuracy == pytest.approx((0.5 + 1 + 1) / 3)
    # F1 = 2 TP / (2 TP + FP + FN): 2/3, 2/3 and 1
    assert scores.macro_f1 == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert scores.loss == pytest.approx(-(math.log(0.7) + math.log(0.3) + math.log(0.8) + math.log(0.5)) / 4)
    # All pairs are in order: {0.7, 0.3} above {0.1, 0.2}; 0.8 above the rest; 0.5 above the rest.
    assert scores.macro_auc == 1.0


def test_auc_counts_pairs_in_the_wrong_order():
    of_class_1 = np.array([0.1, 0.4, 0.35, 0.8])  # labels 0, 0, 1, 1: three of the four pairs are in order
    scores = score(np.stack([1 - of_class_1, of_class_1], axis=1), np.array([0, 0, 1, 1]), 2)
    assert scores.macro_auc == 0.75


def test_a_class_that_does_not_occur_counts_nowhere():
    probabilities = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1]])
    scores = score(probabilities, np.array([0, 1, 0]), 3)
    assert scores.balanced_accuracy == scores.macro_f1 == scores.macro_auc == 1.0
    assert scores.confusion[2] == (0, 0, 0)


def test_one_class_alone_has_no_auc():
    scores = score(np.array([[0.9, 0.1], [0.4, 0.6]]), np.array([0, 0]), 2)
    assert scores.macro_auc is None
    assert scores.balanced_accuracy == 0.5


def test_a_probability_of_zero_leaves_the_loss_finite():
    scores = score(np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([0, 0]), 2)
    assert scores.loss == pytest.approx(-math.log(np.finfo(np.float64).tiny) / 2)


@pytest.mark.parametrize("seed", range(5))
def test_scikit_learn_agrees(seed: int):
    from sklearn import metrics

    rng = np.random.default_rng(seed)
    probabilities = np.round(rng.dirichlet(np.ones(4), size=30), 1)  # rounded, so that there are ties
    labels = rng.integers(0, 3 + seed % 2, size=30)  # without and with the fourth class
    scores = score(probabilities, labels, 4)
    predictions = probabilities.argmax(axis=1)
    assert scores.confusion == tuple(
        map(tuple, metrics.confusion_matrix(labels, predictions, labels=range(4)).tolist())
    )
    assert scores.accuracy == pytest.approx(metrics.accuracy_score(labels, predictions))
    recalls = metrics.recall_score(labels, predictions, labels=np.unique(labels), average="macro")
    assert scores.balanced_accuracy == pytest.approx(recalls)
    assert scores.macro_f1 == pytest.approx(metrics.f1_score(labels, predictions, average="macro"))
    areas = [metrics.roc_auc_score(labels == c, probabilities[:, c]) for c in np.unique(labels)]
    assert scores.macro_auc == pytest.approx(np.mean(areas))


def test_nothing_is_ever_nan():
    rng = np.random.default_rng(0)
    for count in (1, 2, 5, 40):
        probabilities = rng.dirichlet(np.ones(4), size=count)
        scores = score(probabilities, rng.integers(0, 4, size=count), 4)
        values = [getattr(scores, name) for name in METRICS]
        assert all(math.isfinite(value) for value in values if value is not None)


@pytest.mark.parametrize(
    ("probabilities", "labels"),
    [
        (np.zeros((0, 2)), np.zeros(0, dtype=np.int64)),
        (np.full((3, 2), 0.5), np.array([0, 1])),
        (np.full((2, 3), 1 / 3), np.array([0, 1])),
        (np.array([[np.nan, 0.5], [0.5, 0.5]]), np.array([0, 1])),
    ],
)
def test_what_cannot_be_scored_is_refused(probabilities: np.ndarray, labels: np.ndarray):
    with pytest.raises(ValueError, match="probabilities"):
        score(probabilities, labels, 2)
