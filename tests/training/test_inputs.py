from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from studytool.data.shards import open_dataset
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
