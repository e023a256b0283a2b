"""Volumes as a network takes them: on the device, as float32, filtered, normalized and, in training, augmented."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from studytool import registry
from studytool.data.shards import Dataset
from studytool.data.stream import Stream
from studytool.data.voxels import widened_tensor
from studytool.seeds import derive_seed
from studytool.settings import InputSettings
from studytool.training.meter import CostMeter


class Feed:
    """The batches of some rows of a dataset; the order and the augmentations are a function of (`seed`, epoch).

    Volumes cross to the device as they are stored (float16 takes half the time) and are widened there.
    """

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
    ) -> None:
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
        names = settings.augment if training else ()
        self._augment = [registry.lookup("augmentation", name, registry.AUGMENTATIONS) for name in names]

    def __len__(self) -> int:
        return len(self._stream)

    def epoch(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of one epoch: volumes [B, 1, D, H, W] float32 and labels [B] int64, both on the device."""
        generator = torch.Generator(self._device).manual_seed(derive_seed(self._seed, "augment", epoch))
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
            for augment in self._augment:
                volumes_B1DHW = augment(volumes_B1DHW, generator)
            yield volumes_B1DHW.contiguous(memory_format=self._memory_format), labels_B
