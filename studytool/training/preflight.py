"""What can be known to be impossible before the first training step."""

from __future__ import annotations

import itertools
import os
import shutil
from weakref import WeakSet

import torch

from studytool.data.labels import training_rows
from studytool.data.leakage import check_leakage
from studytool.data.shards import Dataset
from studytool.errors import DataError, TrainingError
from studytool.models.adapt import StagedModel
from studytool.models.freeze import release
from studytool.spec import TrialSpec
from studytool.training.loss import micro_batches


def check_data(trial: TrialSpec, dataset: Dataset) -> None:
    """Check that the dataset has what the trial needs; only the confirm phase asks for a test split.

    Raises:
        DataError: a split, a class or labels are missing, or a filter or augmentation is not for volumes like these;
            the message says which; or two splits share something (see `check_leakage`).
    """
    classes = dataset.manifest.classes
    if len(classes) < 2:
        raise DataError(
            f"{dataset.folder}: there is nothing to tell apart: the only class is {', '.join(classes) or 'none'}"
        )
    occurring = {
        split: set(dataset.labels[dataset.rows(split)].tolist())
        for split in ("train", "val", *(["test"] if trial.phase == "confirm" else []))
    }
    missing = [name for label, name in enumerate(classes) if label not in occurring["train"]]
    if missing:
        raise DataError(
            f"{dataset.folder}: the train split has no volume of {', '.join(missing)}; "
            "split the data so that every class is in it, or leave the class out"
        )
    if trial.metric.name == "val/macro_auc" and len(occurring["val"]) < 2:
        raise DataError(
            f"{dataset.folder}: metric val/macro_auc needs two classes in the val split, which has only "
            f"{classes[occurring['val'].pop()]}; split the data anew, or choose another metric"
        )
    training_rows(dataset, trial.input, trial.seed)
    if dataset not in _WITHOUT_LEAK:
        check_leakage(dataset)
        _WITHOUT_LEAK.add(dataset)
    _check_volumes(trial, dataset)


_WITHOUT_LEAK: WeakSet[Dataset] = WeakSet()
"""Opened datasets that were held against leaks already: a process trains many trials on one."""


def _check_volumes(trial: TrialSpec, dataset: Dataset) -> None:
    """Check that the filter and the augmentations can work on volumes of this resolution and shape."""
    voxel_size_angstrom, finest = dataset.manifest.voxel_size_angstrom, trial.input.low_pass_angstrom
    nyquist_angstrom = 2 * voxel_size_angstrom
    if trial.input.filter != "none" and finest < nyquist_angstrom:
        raise DataError(
            f"{dataset.folder}: low_pass_angstrom {finest:g} is finer than voxels of {voxel_size_angstrom:g} Å can "
            f"show: their Nyquist limit is {nyquist_angstrom:g} Å; give at least that, or filter: none"
        )
    shape_dhw = dataset.manifest.shape_dhw
    if "rotations24" in trial.input.augment and len(set(shape_dhw)) > 1:
        raise DataError(
            f"{dataset.folder}: augment rotations24 needs cubes, the volumes are {'x'.join(map(str, shape_dhw))}; "
            "leave it out (turns work on any shape), or cut cubes"
        )


def check_compiler(trial: TrialSpec, device: torch.device) -> None:
    """Check that `compile: on` finds the compiler that torch will call.

    Raises:
        TrainingError: there is none.
    """
    if trial.train.compile == "off":
        return
    variable, usual = ("CXX", ("g++", "clang++")) if device.type == "cpu" else ("CC", ("gcc", "clang"))
    names = [os.environ[variable]] if variable in os.environ else usual
    if not any(shutil.which(name) for name in names):
        raise TrainingError(
            f"compile: on needs a compiler here, found none ({' or '.join(names)}); install one, name it in the "
            f"environment variable {variable}, or set compile: off"
        )


def check_last_batch(
    trial: TrialSpec, model: StagedModel, *, volume_shape_dhw: tuple[int, ...], num_train: int
) -> None:
    """Check that batch normalization can work on the smallest batch (or part of one), if that is of one volume.

    A single volume gives a channel as many values as it has voxels there: enough, but for the last layers of a
    small volume. So it is tried, on the device, with copies of the running statistics.

    Raises:
        TrainingError: it cannot; the message names a batch size that works.
    """
    batch_size, accumulate = trial.train.batch_size, trial.train.accumulate
    if _smallest_part(num_train, batch_size, accumulate) > 1:
        return
    device = next(model.parameters()).device
    volumes_B1DHW = torch.zeros(1, 1, *volume_shape_dhw, device=device)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    # Everything that is ever trained, with gradual freezing too.
    release(model, trial.train.max_epochs)
    model.train()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[device.index] if device.type == "cuda" else []):
            torch.func.functional_call(model, buffers, (volumes_B1DHW,))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        sizes = itertools.count(batch_size + 1)
        better = next(size for size in sizes if _smallest_part(num_train, size, accumulate) > 1)
        what = "the last batch" if accumulate == 1 else f"a part of a batch (accumulate {accumulate})"
        raise TrainingError(
            f"batch_size {batch_size}: of {num_train} training volumes {what} would hold one, and batch "
            f"normalization of {trial.model.backbone} needs more than one value per channel; use for example {better}"
        ) from error
    finally:
        release(model, 1)


def _smallest_part(num_train: int, batch_size: int, accumulate: int) -> int:
    """Volumes in the smallest part that a batch of an epoch is computed in."""
    batches = {min(num_train, batch_size), num_train % batch_size} - {0}
    return min(
        len(range(count)[part])
        for count in batches
        for part in micro_batches(count, batch_size=batch_size, accumulate=accumulate)
    )
