"""A finished trial -> class probabilities for the volumes of a dataset."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from studytool.data.particles import STORED
from studytool.data.shards import Dataset, open_dataset
from studytool.errors import DataError, TrainingError
from studytool.training.device import choose_device, choose_memory_format, choose_precision, release_memory
from studytool.training.evaluate import class_probabilities
from studytool.training.inputs import Feed
from studytool.training.meter import CostMeter
from studytool.training.trained import BestRecord, load_trained

VOXEL_SIZE_TOLERANCE = 0.01
"""How far voxel sizes may differ (relative) before molecules would have another size than in training."""


@dataclass(frozen=True)
class Predictions:
    """Probabilities [N, C] (rows add up to 1) of `classes`, in order, for the particles with these ids [N]."""

    particle_ids: NDArray[np.str_]
    probabilities: NDArray[np.float64]
    classes: tuple[str, ...]

    @property
    def labels(self) -> list[str]:
        """The most probable class of every particle."""
        return [self.classes[i] for i in self.probabilities.argmax(axis=1)]


def predict_dataset(
    trial_folder: Path,
    dataset_folder: Path,
    split: str | None = None,
    *,
    data_split: str | None = None,
    device: str | None = None,
) -> Predictions:
    """Label a dataset's volumes, or those of one split of it, with the selected weights of a trial.

    `data_split` names the dataset's split that `split` is a part of (default: the trial's own).

    Volumes go through the same code, in batches of the same size, as the trial's own evaluation, so that predicting
    its test split on the same kind of device reproduces the recorded test scores exactly.

    Raises:
        WeightsError: the folder holds no trained network that can be used.
        DataError: the volumes have another shape or voxel size than those it was trained on, or the split is missing.
        TrainingError: the network's output is not finite, or there is no such device.
    """
    chosen = choose_device(device)
    trained = load_trained(trial_folder)
    named = STORED if split is None else data_split or trained.trial.data_split
    dataset = open_dataset(dataset_folder, named)
    _check_fits(trained.record, dataset)
    rows = np.arange(len(dataset.labels)) if split is None else dataset.rows(split)
    memory_format = choose_memory_format(trained.trial.train.channels_last, trained.model)
    trained.model.to(chosen).to(memory_format=memory_format)
    meter = CostMeter(chosen)
    feed = Feed(
        dataset,
        rows,
        trained.trial.input,
        batch_size=trained.trial.train.batch_size,
        training=False,
        seed=trained.trial.seed,
        device=chosen,
        memory_format=memory_format,
        meter=meter,
    )
    precision = choose_precision(trained.trial.train.precision, chosen)
    probabilities = class_probabilities(trained.model, feed, precision, meter)
    finite = np.isfinite(probabilities).all(axis=1)
    if not finite.all():
        first = dataset.particle_ids[rows[np.flatnonzero(~finite)[0]]]
        raise TrainingError(f"{trial_folder}: the network's output for particle {first} is not finite; is its volume?")
    predictions = Predictions(dataset.particle_ids[rows], probabilities, trained.classes)
    del trained, feed
    release_memory(chosen)
    return predictions


def _check_fits(record: BestRecord, dataset: Dataset) -> None:
    manifest = dataset.manifest
    if tuple(manifest.shape_dhw) != record.volume_shape_dhw:
        found, wanted = ("x".join(map(str, shape)) for shape in (manifest.shape_dhw, record.volume_shape_dhw))
        raise DataError(f"{dataset.folder}: its volumes are {found}, the trial was trained on {wanted}; cut them so")
    found_size, trained_size = manifest.voxel_size_angstrom, record.voxel_size_angstrom
    if abs(found_size - trained_size) > VOXEL_SIZE_TOLERANCE * trained_size:
        raise DataError(
            f"{dataset.folder}: its voxels are {found_size:g} Å, the trial was trained on {trained_size:g} Å; "
            "rescale the volumes to that"
        )
