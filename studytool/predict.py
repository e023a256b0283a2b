"""A finished trial -> class probabilities for volumes: of a dataset, or of any source that can be imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from studytool.data.importplan import SAME_VOXEL_SIZE
from studytool.data.particles import STORED
from studytool.data.preparation import Contrast, Preparation, Preparer, contrast_of, preparation_of
from studytool.data.preprocess import network_input
from studytool.data.remote_copy import local_copy
from studytool.data.shards import Dataset, open_dataset
from studytool.data.voxels import widened, widened_tensor
from studytool.data.workers import results_in_order, usable_cores
from studytool.errors import DataError, TrainingError
from studytool.models.embedding import embed
from studytool.training.calibration import (
    Calibration,
    fit_temperature,
    mean_loss,
    read_calibration,
    with_temperature,
    write_calibration,
)
from studytool.training.device import (
    choose_device,
    choose_memory_format,
    choose_precision,
    release_memory,
    reuse_memory,
)
from studytool.training.evaluate import class_probabilities
from studytool.training.inputs import Batches, Feed
from studytool.training.meter import CostMeter
from studytool.training.trained import BestRecord, load_trained

if TYPE_CHECKING:
    from studytool.models.anatomy import Activations

OnProgress = Callable[[int, int], None]

_WORTH_PROCESSES = 6000 * 32**3  # voxels; starting processes takes longer than reading fewer
_CHUNK = 16
_LOOKED_AT = 64  # volumes whose contrast is measured


@dataclass(frozen=True)
class Predictions:
    """Probabilities [N, C] (rows add up to 1) of `classes`, in order, for the particles with these ids [N].

    `features` [N, F], where they were asked for, are what the head of the network reads. `contrast` is that of the
    first volumes.
    """

    particle_ids: NDArray[np.str_]
    probabilities: NDArray[np.float64]
    classes: tuple[str, ...]
    features: NDArray[np.float32] | None = None
    contrast: Contrast | None = None

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
    with Predictor(trial_folder, device=device) as predictor:
        dataset = open_dataset(dataset_folder, predictor.data_split_for(split, data_split))
        return predictor.label_rows(dataset, rows_of(dataset, split))


class Predictor:
    """The network of a trial, ready to label; as a context manager it gives its memory back.

    `precision` is that of its numbers (default: as in training).

    Raises:
        WeightsError: the folder holds no trained network that can be used.
        TrainingError: there is no such device.
    """

    def __init__(self, trial_folder: Path, *, device: str | None = None, precision: str | None = None) -> None:
        self.folder = trial_folder
        self.device = choose_device(device)
        trained = load_trained(trial_folder)
        self.record: BestRecord = trained.record
        self.classes = trained.classes
        self.trial = trained.trial
        reuse_memory(self.trial.train.reuse_memory, self.device)
        self.memory_format = choose_memory_format(self.trial.train.channels_last, trained.model, self.device)
        self.model = trained.model.to(self.device).to(memory_format=self.memory_format)
        self._precision = choose_precision(precision or self.trial.train.precision, self.device)

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, *_: object) -> None:
        del self.model
        release_memory(self.device)

    def data_split_for(self, split: str | None, data_split: str | None) -> str:
        """The name of the dataset's split that "train", "val" or "test" is a part of."""
        return STORED if split is None else data_split or self.trial.data_split

    def preparation(self) -> Preparation:
        """What was done to the training volumes; of trials of older versions as far as their dataset is still there."""
        if self.record.preparation is not None:
            return self.record.preparation
        dataset = self.own_dataset()
        if dataset is not None:
            return preparation_of(dataset.manifest)
        return Preparation(self.record.volume_shape_dhw, self.record.voxel_size_angstrom, "float16")

    def calibration(self) -> Calibration | None:
        """The temperature of the probabilities: kept beside the weights, or fitted now on the validation split.

        None where the trial's dataset is no longer there, or was changed.
        """
        kept = read_calibration(self.folder, self.record.sha256)
        if kept is not None:
            return kept
        dataset = self.own_dataset()
        if dataset is None:
            return None
        rows = dataset.rows("val")
        predicted = self.label_rows(dataset, rows)
        labels, before = dataset.labels[rows], predicted.probabilities
        temperature = fit_temperature(before, labels)
        contrast = predicted.contrast or Contrast(0.0, 1e9)
        fitted = Calibration(
            temperature=temperature,
            count=len(rows),
            loss_before=mean_loss(before, labels),
            loss_after=mean_loss(with_temperature(before, temperature), labels),
            contrast=contrast.mean,
            contrast_error=contrast.error,
            sha256=self.record.sha256,
        )
        with suppress(OSError):  # where the trial cannot be written to, it is fitted again the next time
            write_calibration(self.folder, fitted)
        return fitted

    def label_rows(
        self,
        dataset: Dataset,
        rows: NDArray[np.int64],
        *,
        features: bool = False,
        on_progress: OnProgress | None = None,
    ) -> Predictions:
        """Label rows of a dataset whose volumes are like those of training.

        Raises:
            DataError: they have another shape or voxel size.
            TrainingError: the network's output is not finite.
        """
        _check_fits(self.record, dataset)
        meter = CostMeter(self.device)
        feed = Feed(
            dataset,
            rows,
            self.trial.input,
            batch_size=self.trial.train.volumes_at_once,
            training=False,
            seed=self.trial.seed,
            device=self.device,
            memory_format=self.memory_format,
            meter=meter,
        )
        first = np.empty((min(len(rows), _LOOKED_AT), *dataset.manifest.shape_dhw), dataset.manifest.dtype)
        dataset.gather(rows[np.linspace(0, len(rows) - 1, len(first)).astype(np.int64)], first)
        ids = dataset.particle_ids[rows]
        return self._label(_Counted(feed, len(rows), on_progress), ids, meter, contrast_of(widened(first)), features)

    def label_source(
        self,
        preparer: Preparer,
        *,
        features: bool = False,
        workers: int | None = None,
        on_progress: OnProgress | None = None,
    ) -> Predictions:
        """Label every particle of a source, in its order; volumes are read as they are needed, by several processes.

        Raises:
            DataError: a volume cannot be read or brought to the form of the training volumes.
            TrainingError: the network's output is not finite.
        """
        count = len(preparer.entries)
        if workers is None:
            workers = usable_cores() if count * int(np.prod(preparer.wanted.shape_dhw)) > _WORTH_PROCESSES else 1
        feed = _SourceFeed(self, preparer, workers)
        ids = np.array([entry.particle_id for entry in preparer.entries])
        predictions = self._label(_Counted(feed, count, on_progress), ids, CostMeter(self.device), None, features)
        contrast = contrast_of(np.stack(feed.first))
        return Predictions(ids, predictions.probabilities, self.classes, predictions.features, contrast)

    def _label(
        self, feed: Batches, ids: NDArray[Any], meter: CostMeter, contrast: Contrast | None, features: bool
    ) -> Predictions:
        keeping = _KeepingFeatures(self.model) if features else None
        probabilities = class_probabilities(keeping or self.model, feed, self._precision, meter)
        finite = np.isfinite(probabilities).all(axis=1)
        if not finite.all():
            first = ids[np.flatnonzero(~finite)[0]]
            raise TrainingError(
                f"{self.folder}: the network's output for particle {first} is not finite; is its volume?"
            )
        kept = np.concatenate(keeping.kept) if keeping else None
        return Predictions(ids, probabilities, self.classes, kept, contrast)

    def own_dataset(self) -> Dataset | None:
        """The dataset of the trial, opened with its split, if it is there and unchanged."""
        try:
            folder = local_copy(self.trial.data_path, leave_out=self.trial.data_leave_out)
            dataset = open_dataset(folder, self.trial.data_split)
        except DataError:
            return None
        return dataset if dataset.fingerprint == self.record.data_fingerprint else None

    def was_trained_on(self, dataset: Dataset) -> bool:
        """Whether a dataset is the trial's own, whatever its split is called and wherever it is, or shares shards."""
        own = self.own_dataset()
        shards = {shard.sha256 for shard in dataset.manifest.shards}
        if own is not None and any(shard.sha256 in shards for shard in own.manifest.shards):
            return True
        try:
            fingerprint = open_dataset(dataset.folder, self.trial.data_split).fingerprint
        except DataError:
            return False
        return fingerprint == self.record.data_fingerprint


def rows_of(dataset: Dataset, split: str | None) -> NDArray[np.int64]:
    """The rows of a split, or all."""
    return np.arange(len(dataset)) if split is None else dataset.rows(split)


def fits(record: BestRecord, dataset: Dataset) -> bool:
    """Whether the volumes of a dataset have the shape and voxel size of the training volumes."""
    found, trained = dataset.manifest.voxel_size_angstrom, record.voxel_size_angstrom
    same_shape = tuple(dataset.manifest.shape_dhw) == record.volume_shape_dhw
    return same_shape and abs(found - trained) <= SAME_VOXEL_SIZE * trained


class _SourceFeed:
    """The volumes of a source as batches for the network; `first` are the first of them, as they are stored."""

    after: str | None = None

    def __init__(self, predictor: Predictor, preparer: Preparer, workers: int) -> None:
        self._predictor = predictor
        self._preparer = preparer
        self._workers = workers
        self._batch_size = predictor.trial.train.volumes_at_once
        self.first: list[NDArray[np.float32]] = []

    def __len__(self) -> int:
        return -(-len(self._preparer.entries) // self._batch_size)

    def epoch(self, _epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches, with labels of 0 that mean nothing."""
        numbers = range(len(self._preparer.entries))
        batch: list[NDArray[Any]] = []
        for volume_DHW in results_in_order(self._preparer, numbers, workers=self._workers, chunk=_CHUNK):
            if len(self.first) < _LOOKED_AT:
                self.first.append(widened(volume_DHW))
            batch.append(volume_DHW)
            if len(batch) == self._batch_size:
                yield self._on_device(batch)
                batch = []
        if batch:
            yield self._on_device(batch)

    def _on_device(self, batch: Sequence[NDArray[Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        predictor = self._predictor
        stored_B1DHW = torch.from_numpy(np.stack(batch)[:, None]).to(predictor.device)
        prepared_B1DHW = network_input(
            widened_tensor(stored_B1DHW), predictor.record.voxel_size_angstrom, predictor.trial.input
        )
        labels_B = torch.zeros(len(batch), dtype=torch.int64, device=predictor.device)
        return prepared_B1DHW.contiguous(memory_format=predictor.memory_format), labels_B


class _Counted:
    """Batches that tell how many volumes have been taken."""

    def __init__(self, feed: Batches, total: int, on_progress: OnProgress | None) -> None:
        self._feed = feed
        self._total = total
        self._on_progress = on_progress
        self.after = feed.after

    def __len__(self) -> int:
        return len(self._feed)

    def epoch(self, epoch: int) -> Iterator[tuple[Activations, torch.Tensor]]:
        """The batches of an epoch."""
        done = 0
        for inputs, labels_B in self._feed.epoch(epoch):
            yield inputs, labels_B
            done += len(labels_B)
            if self._on_progress is not None:
                self._on_progress(done, self._total)


class _KeepingFeatures(nn.Module):
    """The network, which also keeps what its head reads."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.kept: list[NDArray[np.float32]] = []

    def forward(self, volumes_B1DHW: torch.Tensor, after: str | None = None) -> torch.Tensor:
        del after
        features_BF = embed(self.model, volumes_B1DHW)
        self.kept.append(features_BF.cpu().numpy())
        logits: torch.Tensor = self.model.head(features_BF)
        return logits


def _check_fits(record: BestRecord, dataset: Dataset) -> None:
    if fits(record, dataset):
        return
    manifest = dataset.manifest
    if tuple(manifest.shape_dhw) != record.volume_shape_dhw:
        found, wanted = ("x".join(map(str, shape)) for shape in (manifest.shape_dhw, record.volume_shape_dhw))
        raise DataError(f"{dataset.folder}: its volumes are {found}, the trial was trained on {wanted}; cut them so")
    raise DataError(
        f"{dataset.folder}: its voxels are {manifest.voxel_size_angstrom:g} Å, the trial was trained on "
        f"{record.voxel_size_angstrom:g} Å; rescale the volumes to that"
    )
