from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from studytool.data.labels import training_rows
from studytool.data.preprocess import low_pass, standard
from studytool.data.shards import open_dataset
from studytool.errors import DataError
from studytool.settings import InputSettings
from studytool.training.inputs import Feed
from studytool.training.meter import CostMeter

CPU = torch.device("cpu")


def feed(folder: Path, split: str = "train", *, training: bool, seed: int = 3, **settings: object) -> Feed:
    dataset = open_dataset(folder)
    return Feed(
        dataset,
        dataset.rows(split),
        InputSettings(**settings),
        batch_size=8,
        training=training,
        seed=seed,
        device=CPU,
        memory_format=torch.channels_last_3d,
        meter=CostMeter(CPU),
    )


def epoch(source: Feed, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    batches = [(volumes.clone(), labels.clone()) for volumes, labels in source.epoch(number)]
    return torch.cat([volumes for volumes, _ in batches]), torch.cat([labels for _, labels in batches])


def test_volumes_are_float32_of_the_stated_shape_and_layout(dataset_folder: Path):
    source = feed(dataset_folder, training=True)
    shapes = []
    for volumes, labels in source.epoch(1):
        shapes.append(tuple(volumes.shape))
        assert volumes.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert volumes.is_contiguous(memory_format=torch.channels_last_3d)
    assert shapes == [(8, 1, 12, 12, 12), (8, 1, 12, 12, 12), (5, 1, 12, 12, 12)]
    assert len(source) == 3


def test_evaluation_has_every_row_in_order_and_as_it_is(dataset_folder: Path):
    dataset = open_dataset(dataset_folder)
    rows = dataset.rows("val")
    stored = np.zeros((len(rows), 12, 12, 12), dtype=np.float16)
    dataset.gather(rows, stored)
    volumes, labels = epoch(feed(dataset_folder, "val", training=False, normalize="none"), 1)
    assert np.array_equal(labels.numpy(), dataset.labels[rows])
    assert np.array_equal(volumes[:, 0].numpy(), stored.astype(np.float32))


def test_training_is_a_function_of_seed_and_epoch(dataset_folder: Path):
    source = feed(dataset_folder, training=True, augment=("turns", "shift", "noise"))
    first, again = epoch(source, 1), epoch(source, 1)
    assert torch.equal(first[0], again[0])
    other_epoch, other_seed = epoch(source, 2), epoch(feed(dataset_folder, training=True, seed=4), 1)
    assert not torch.equal(first[0], other_epoch[0])
    assert not torch.equal(first[0], other_seed[0])
    assert sorted(first[1].tolist()) == sorted(other_epoch[1].tolist()) == [0] * 7 + [1] * 7 + [2] * 7


def test_augmentation_changes_training_volumes_only_if_asked_for(dataset_folder: Path):
    plain = epoch(feed(dataset_folder, training=True, augment=()), 1)
    noisy = epoch(feed(dataset_folder, training=True, augment=("noise",)), 1)
    assert torch.equal(plain[1], noisy[1])
    assert not torch.equal(plain[0], noisy[0])
    still = epoch(feed(dataset_folder, training=False, augment=("noise",)), 1)
    assert torch.equal(still[0], epoch(feed(dataset_folder, training=False, augment=()), 2)[0])


def test_volumes_are_filtered_at_their_voxel_size_before_they_are_normalized(dataset_folder: Path):
    stored = epoch(feed(dataset_folder, "val", training=False, normalize="none"), 1)[0]
    settings = InputSettings(filter="low_pass", low_pass_angstrom=50.0)
    expected = standard(low_pass(stored, 10.0, settings))
    found = epoch(feed(dataset_folder, "val", training=False, filter="low_pass", low_pass_angstrom=50.0), 1)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_training_rows_are_of_the_train_split_and_so_many_of_each_class(dataset_folder: Path):
    dataset = open_dataset(dataset_folder)
    for settings, expected in (
        (InputSettings(), [7, 7, 7]),
        (InputSettings(labels_per_class=3), [3, 3, 3]),
        (InputSettings(label_fraction=0.25), [2, 2, 2]),
    ):
        rows = training_rows(dataset, settings, seed=1)
        assert np.bincount(dataset.labels[rows]).tolist() == expected
        assert set(dataset.splits[rows]) == {"train"}
    assert np.array_equal(training_rows(dataset, InputSettings(), 1), dataset.rows("train"))


def test_more_labels_than_there_are(dataset_folder: Path):
    with pytest.raises(DataError, match=r"labels_per_class is 8, but ball has 7 volumes in the train split; ask for"):
        training_rows(open_dataset(dataset_folder), InputSettings(labels_per_class=8), 1)


def test_two_limits_on_the_labels_are_refused():
    with pytest.raises(ValueError, match=r"labels_per_class \(3\) and label_fraction \(0.25\) both limit"):
        InputSettings(labels_per_class=3, label_fraction=0.25)
