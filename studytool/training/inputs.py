"""Volumes as a network takes them: on the device, as float32, filtered, normalized and, in training, augmented."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from studytool import registry
from studytool.data.shards import Dataset
from studytool.data.stream import Stream
from studytool.data.voxels import widened_tensor
from studytool.models.anatomy import Activations
from studytool.seeds import derive_seed
from studytool.settings import InputSettings
from studytool.training.meter import CostMeter


class Batches(Protocol):
    """What a network is fed with: volumes, or the activations `after` a part of it."""

    after: str | None

    def __len__(self) -> int:
        """The number of batches of an epoch."""

    def epoch(self, epoch: int) -> Iterator[tuple[Activations, torch.Tensor]]:
        """The batches of one epoch: what enters the network, and labels [B] int64, all on the device."""


class Feed:
    """The batches of some rows of a dataset; the order and the augmentations are a function of (`seed`, epoch).

    Volumes cross to the device as they are stored (float16 takes half the time) and are widened there. Each epoch of
    training augments them anew or, with `views` in the settings, shows one of that many fixed views of every volume;
    `view` fixes it for all epochs.
    """

    after: str | None = None

    def __init__(
        self,
        dataset: Dataset,
        rows: NDArray[np.int64],
        settings: InputSettings,
        *,
        batch_size: int,
        training: bool,
        seed: int,
        device: torch.device,
        memory_format: torch.memory_format,
        meter: CostMeter,
        view: int | None = None,
    ) -> None:
        self._view = view
        self._training = training
        self._seed = seed
        self._device = device
        self._memory_format = memory_format
        self._meter = meter
        self._stream = Stream(
            dataset,
            rows,
            batch_size=batch_size,
            seed=seed,
            shuffle=training,
            pin_memory=device.type == "cuda",
        )
        self._settings = settings
        self._voxel_size_angstrom = dataset.manifest.voxel_size_angstrom
        self._filter = registry.lookup("filter", settings.filter, registry.FILTERS)
        self._normalize = registry.lookup("normalization", settings.normalize, registry.NORMALIZATIONS)
        names = settings.augment if training or view is not None else ()
        self._augment = [registry.lookup("augmentation", name, registry.AUGMENTATIONS) for name in names]

    def __len__(self) -> int:
        return len(self._stream)

    def epoch(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of one epoch: volumes [B, 1, D, H, W] float32 and labels [B] int64, both on the device."""
        generator = torch.Generator(self._device).manual_seed(derive_seed(self._seed, "augment", epoch))
        view = view_of_epoch(self._settings, epoch) if self._training else self._view
        batches = self._stream.epoch(epoch)
        while True:
            with self._meter.phase("data"):
                batch = next(batches, None)
            if batch is None:
                return
            labels_B = batch.labels_B.to(self._device, non_blocking=True)
            stored_B1DHW = batch.volumes_B1DHW.to(self._device, non_blocking=True)
            floating_B1DHW = widened_tensor(stored_B1DHW)
            volumes_B1DHW = self._normalize(self._filter(floating_B1DHW, self._voxel_size_angstrom, self._settings))
            if view is None:
                volumes_B1DHW = self._augmented(volumes_B1DHW, generator)
            elif self._augment:
                volumes_B1DHW = torch.cat(
                    [
                        self._augmented(volumes_B1DHW[i : i + 1], torch.Generator().manual_seed(view_seed(view, row)))
                        for i, row in enumerate(batch.rows_B.tolist())
                    ]
                )
            yield volumes_B1DHW.contiguous(memory_format=self._memory_format), labels_B

    def _augmented(self, volumes_B1DHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        for augment in self._augment:
            volumes_B1DHW = augment(volumes_B1DHW, generator)
        return volumes_B1DHW


def shape_of(inputs: Activations) -> tuple[int, ...]:
    """The shape of a batch; of several pathways that of the first."""
    return tuple((inputs if isinstance(inputs, torch.Tensor) else inputs[0]).shape)


def part_of(inputs: Activations, part: slice) -> Activations:
    """Some samples of a batch."""
    return inputs[part] if isinstance(inputs, torch.Tensor) else [pathway[part] for pathway in inputs]


def view_of_epoch(settings: InputSettings, epoch: int) -> int | None:
    """Which of the fixed views of a volume an epoch of training (counted from 1) sees; None: it draws anew."""
    return None if settings.views is None or not settings.augment else (epoch - 1) % settings.views


def view_seed(view: int, row: int) -> int:
    """What a view of a volume is drawn from: nothing of the trial, so that all trials share it."""
    return derive_seed("view", view, row)
