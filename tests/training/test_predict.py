from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from training_data import CLASSES, particles, write

from studytool.data.shards import open_dataset
from studytool.data.splits import Recipe, store_split
from studytool.data.splitting import make_split
from studytool.errors import DataError, WeightsError
from studytool.predict import predict_dataset
from studytool.results import EpochResult
from studytool.spec import TrialSpec
from studytool.training.loop import train_trial
from studytool.training.metrics import score

MakeTrial = Callable[..., TrialSpec]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trial")


@pytest.fixture
def last(make_trial: MakeTrial, folder: Path) -> EpochResult:
    """The last epoch of a confirm trial, trained once for this module."""
    return list(train_trial(make_trial(max_epochs=6, learning_rate=0.03, phase="confirm"), folder))[-1]


@pytest.mark.parametrize("split", ["test", "val"])
def test_the_logged_scores_come_out_again_exactly(last: EpochResult, folder: Path, dataset_folder: Path, split: str):
    assert last.best_epoch < last.epoch, "the selected weights are not those that training ended with"
    predictions = predict_dataset(folder, dataset_folder, split)
    dataset = open_dataset(dataset_folder)
    scores = score(predictions.probabilities, dataset.labels[dataset.rows(split)], len(CLASSES))
    from studytool.training.trained import read_best

    selected = read_best(folder).result
    assert scores == (selected.test if split == "test" else selected.val)
    assert selected.test == last.test


def test_every_particle_gets_probabilities(last: EpochResult, folder: Path, dataset_folder: Path):
    predictions = predict_dataset(folder, dataset_folder)
    dataset = open_dataset(dataset_folder)
    assert predictions.particle_ids.tolist() == dataset.particle_ids.tolist()
    assert predictions.probabilities.shape == (45, 3)
    np.testing.assert_allclose(predictions.probabilities.sum(axis=1), 1)
    assert predictions.classes == CLASSES
    first = predictions.probabilities[0]
    assert predictions.labels[0] == CLASSES[int(np.argmax(first))]


def test_one_particle_alone_gets_the_same_label(last: EpochResult, folder: Path, dataset_folder: Path, tmp_path: Path):
    together = predict_dataset(folder, dataset_folder, "val")
    alone = write(tmp_path / "one", [p for p in particles() if p.particle_id == "val-rod-2"])
    predictions = predict_dataset(folder, alone)
    at = together.particle_ids.tolist().index("val-rod-2")
    np.testing.assert_allclose(predictions.probabilities[0], together.probabilities[at], rtol=1e-4)


def test_volumes_of_another_shape_or_scale_are_refused(last: EpochResult, folder: Path, tmp_path: Path):
    cut = write(tmp_path / "cut", (replace(p, volume_DHW=p.volume_DHW[:10]) for p in particles()))
    with pytest.raises(DataError, match="its volumes are 10x12x12, the trial was trained on 12x12x12"):
        predict_dataset(folder, cut)
    scaled = write(tmp_path / "scaled", (replace(p, voxel_size_angstrom=13.5) for p in particles()))
    with pytest.raises(DataError, match=r"its voxels are 13\.5 Å, the trial was trained on 10 Å"):
        predict_dataset(folder, scaled)


def test_a_folder_without_a_trial(tmp_path: Path, dataset_folder: Path):
    with pytest.raises(WeightsError, match=r"no best\.json there"):
        predict_dataset(tmp_path, dataset_folder)


def test_a_trial_on_a_named_split_is_trained_and_predicted_on_that(make_trial: MakeTrial, tmp_path: Path):
    """The largest tomogram, which is stored as train, is validated on; the test split is the trial's own as well."""
    data = write(tmp_path / "data", particles())
    store_split(data, make_split(open_dataset(data), Recipe("fractions", (0.2, 0.6, 0.2)), "turned"))
    dataset = open_dataset(data, "turned")
    assert set(dataset.tomograms[dataset.rows("val")]) == {"tomogram-train"}
    trial = make_trial(max_epochs=1, phase="confirm", data_path=str(data), data_split="turned")
    last = list(train_trial(trial, tmp_path / "t"))[-1]
    assert last.cost.samples == len(dataset.rows("train")) == 12
    for split, logged in (("val", last.val), ("test", last.test)):
        found = predict_dataset(tmp_path / "t", data, split)
        assert found.particle_ids.tolist() == dataset.particle_ids[dataset.rows(split)].tolist()
        assert score(found.probabilities, dataset.labels[dataset.rows(split)], 3) == logged
    stored = predict_dataset(tmp_path / "t", data, "val", data_split="stored")
    assert len(stored.particle_ids) == 12
    assert len(predict_dataset(tmp_path / "t", data).particle_ids) == 45
    with pytest.raises(DataError, match="unknown split 'turned'; there are: stored"):
        predict_dataset(tmp_path / "t", write(tmp_path / "other", particles(seed=2)), "test")
    with pytest.raises(WeightsError, match="made with another dataset or split"):
        next(train_trial(make_trial(max_epochs=1, phase="confirm", data_path=str(data)), tmp_path / "t"))
