from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from fabricated_study import CLASSES, WHOLE, make_spec, make_trials

from studytool.report.winner import (
    KeptPredictions,
    class_scores,
    confident_mistakes,
    kept_predictions,
    scores_by_snr,
    scores_by_tomogram,
    summed_confusion,
)
from studytool.training.predictions import PREDICTIONS, TestPredictions, read_test_predictions, save_test_predictions

LABELS = np.array([0, 0, 1, 1])
ONE = np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.6, 0.4]])  # right, wrong, right, wrong
TWO = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.7, 0.3]])  # right, right, right, wrong
ROWS = np.array([1, 3, 4, 5])


class FakeDataset(SimpleNamespace):
    """The columns of six volumes, of which the four of ROWS are the test split."""

    def __len__(self) -> int:
        return 6


@pytest.fixture
def dataset():
    return FakeDataset(
        labels=np.array([1, 0, 1, 0, 1, 1]),
        tomograms=np.array(["t0", "t1", "t0", "t1", "t2", "t2"]),
        particle_ids=np.array(list("abcdef")),
        snr=np.array([np.nan, 0.1, np.nan, 0.1, 0.1, 0.5]),
    )


@pytest.fixture
def kept(tmp_path, dataset) -> KeptPredictions:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder, probabilities in zip(folders, (ONE, TWO), strict=True):
        save_test_predictions(folder, probabilities, LABELS, ROWS)
    found = kept_predictions(folders, dataset)
    assert found is not None
    return found


def test_predictions_are_kept_as_they_were(tmp_path):
    save_test_predictions(tmp_path, ONE, LABELS, ROWS)
    found = read_test_predictions(tmp_path)
    np.testing.assert_array_equal(found.probabilities, ONE.astype(np.float32))
    np.testing.assert_array_equal(found.labels, LABELS)
    np.testing.assert_array_equal(found.rows, ROWS)
    assert found.probabilities.dtype == np.float32
    whole = (tmp_path / PREDICTIONS).read_bytes()
    for damaged in (b"", whole[:50], b"not a zip file"):
        (tmp_path / PREDICTIONS).write_bytes(damaged)
        assert read_test_predictions(tmp_path) is None
    assert read_test_predictions(tmp_path / "nowhere") is None


def test_accuracy_by_tomogram_is_a_mean_over_runs_with_the_worst_first(kept, dataset):
    scores = scores_by_tomogram(kept, dataset)
    assert [(s.name, s.count, s.accuracy.mean) for s in scores] == [("t2", 2, 0.5), ("t1", 2, 0.75)]
    assert scores[1].accuracy.sd == pytest.approx(np.std([0.5, 1.0], ddof=1))


def test_accuracy_by_snr(kept, dataset):
    scores = scores_by_snr(kept, dataset)
    assert [(s.name, s.count) for s in scores] == [("0.1", 3), ("0.5", 1)]
    assert scores[0].accuracy.mean == pytest.approx((2 / 3 + 1) / 2)
    dataset.snr = np.full(6, np.nan)
    assert scores_by_snr(kept, dataset) == ()


def test_many_snrs_are_put_into_groups_that_hold_every_volume():
    n = 100
    labels = np.zeros(n, dtype=np.int64)
    kept = KeptPredictions(np.arange(n), labels, (np.tile([0.9, 0.1], (n, 1)),))
    scores = scores_by_snr(kept, SimpleNamespace(snr=np.linspace(0.01, 1, n)))
    assert len(scores) == 8
    assert sum(s.count for s in scores) == n


def test_the_most_confident_mistakes_come_first(dataset):
    run = TestPredictions(ONE.astype(np.float32), LABELS, ROWS)
    found = confident_mistakes(run, dataset, ("ball", "rod"))
    assert [(m.row, m.particle_id, m.tomogram, m.truth, m.labelled) for m in found] == [
        (3, "d", "t1", "ball", "rod"),
        (5, "f", "t2", "rod", "ball"),
    ]
    assert [m.probability for m in found] == pytest.approx([0.8, 0.6])
    assert len(confident_mistakes(run, dataset, ("ball", "rod"), most=1)) == 1


def test_predictions_of_another_dataset_are_not_used(tmp_path, dataset):
    save_test_predictions(tmp_path, ONE, LABELS, ROWS)
    dataset.labels = 1 - dataset.labels
    assert kept_predictions([tmp_path], dataset) is None
    assert kept_predictions([tmp_path / "none"], dataset) is None


def test_scores_by_class_are_those_of_the_confusion_matrices(tmp_path):
    spec = make_spec(tmp_path)
    records = [record for _, record in make_trials(spec)]
    matrices = [np.array(r.test.confusion) for r in records if r.arm == WHOLE and r.test]
    total = summed_confusion(spec, records, WHOLE)
    np.testing.assert_array_equal(total, sum(matrices))
    scores = {s.name: s for s in class_scores(spec, records, WHOLE, CLASSES)}
    assert set(scores) == set(CLASSES)
    barrel = scores["barrel"]
    assert barrel.recall.mean == pytest.approx(np.mean([m[1, 1] / 100 for m in matrices]))
    assert barrel.precision == pytest.approx(total[1, 1] / total[:, 1].sum())
    wrong = np.where(np.arange(4) == 1, 0, total[1])
    assert barrel.mostly_taken_for.startswith(CLASSES[int(wrong.argmax())])
    recalls = [s.recall.mean for s in class_scores(spec, records, WHOLE, CLASSES)]
    assert recalls == sorted(recalls)
