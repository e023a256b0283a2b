"""What can be known to be impossible before the first training step."""

from __future__ import annotations

import torch

from studytool.data.shards import Dataset
from studytool.errors import DataError, TrainingError
from studytool.models.adapt import StagedModel
from studytool.models.freeze import release
from studytool.spec import TrialSpec


def check_data(trial: TrialSpec, dataset: Dataset) -> None:
    """Check that the dataset has the splits and classes the trial needs; only the confirm phase asks for a test split.

    Raises:
        DataError: a split or a class is missing; the message says which.
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


def check_last_batch(
    trial: TrialSpec, model: StagedModel, *, volume_shape_dhw: tuple[int, ...], num_train: int
) -> None:
    """Check that batch normalization can work on the smallest batch, if that is of one volume.

    A single volume gives a channel as many values as it has voxels there: enough, but for the last layers of a
    small volume. So it is tried, on the device, with copies of the running statistics.

    Raises:
        TrainingError: it cannot; the message names a batch size that works.
    """
    batch_size = trial.train.batch_size
    if num_train % batch_size != 1 % batch_size:
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
        better = next(size for size in range(batch_size + 1, batch_size + num_train + 2) if num_train % size != 1)
        raise TrainingError(
            f"batch_size {batch_size}: of {num_train} training volumes the last batch would hold one, and batch "
            f"normalization of {trial.model.backbone} needs more than one value per channel; use for example {better}"
        ) from error
    finally:
        release(model, 1)
