"""The frozen part of a network, run once: its activations are kept on disk, and training begins at the cut.

While the leading parts of a network are frozen, with their batch normalization in evaluation mode, they give the same
activations for the same volume in every epoch and in every trial with the same weights. They are computed once per
machine and written as a dataset of their own (see `studytool.data.shards`), which training then streams like volumes.

An entry is named by the hash of all that its activations depend on: the volumes and which of them, the settings of the
input, the weights and the code of the frozen parts, how they are computed. It holds one view of every volume: the plain
one or, with `views: N`, one of N fixed augmentations. Entries used longest ago make room for new ones; a damaged one is
made again. Where the folder of the cache cannot be used, the activations are computed each time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from studytool.data.cachefolder import bound_bytes, cache_folder, locked, make_room
from studytool.data.damage import damaged_shards
from studytool.data.particles import Particle
from studytool.data.shards import Dataset, open_dataset, write_dataset
from studytool.data.stream import Stream
from studytool.errors import DataError
from studytool.models.adapt import StagedModel
from studytool.models.anatomy import Activations
from studytool.settings import InputSettings
from studytool.training.cut import Cut, digest_of_code, digest_of_weights, pathways, run_frozen
from studytool.training.device import Precision
from studytool.training.evaluate import autocast, convolutions
from studytool.training.inputs import Feed, view_of_epoch
from studytool.training.meter import CostMeter, Phase

FORMAT = 1
FILL_BATCH = 32
_IN_A_SHARD = 4096
_log = logging.getLogger(__name__)


class FeatureCache:
    """The activations of one network at its cut, for whatever rows are asked for.

    Making an entry is charged to the trial that makes it, as training or evaluation, whichever it is for.
    """

    def __init__(
        self,
        model: StagedModel,
        cut: Cut,
        dataset: Dataset,
        precision: Precision,
        memory_format: torch.memory_format,
        meter: CostMeter,
        *,
        at_once: int = FILL_BATCH,
    ) -> None:
        self.cut = cut
        self._at_once = min(at_once, FILL_BATCH)
        self.dataset = dataset
        self.device = next(model.parameters()).device
        self.meter = meter
        self._model = model
        self._precision = precision
        self._memory_format = memory_format
        self._weights = digest_of_weights(model, cut.after)
        self._code = digest_of_code(model, cut.after)
        self._opened: dict[Path, tuple[Dataset, float]] = {}

    def serves(self, rows: NDArray[np.int64], settings: InputSettings, *, training: bool) -> bool:
        """Whether the activations of these rows stay the same, and are there or may take the room they need."""
        if training and settings.augment and settings.views is None:
            return False
        views = range(settings.views) if settings.views and training and settings.augment else [None]
        entry_bytes = 4 * self.cut.size * len(rows)
        try:
            folder = cache_folder("features")
            missing = sum(not (folder / self._name(rows, settings, view)).exists() for view in views)
            fits = missing * entry_bytes <= shutil.disk_usage(folder).free / 2
            return fits and len(views) * entry_bytes <= bound_bytes()
        except OSError as error:
            _log.warning("frozen parts are computed each time, the cache cannot be used: %s", error)
            return False

    def entry(
        self, rows: NDArray[np.int64], settings: InputSettings, view: int | None, phase: Phase
    ) -> tuple[Dataset, float]:
        """The activations of `rows`, in their order, as a dataset; and the seconds that computing one took.

        Computed if they are not there. Another process that is computing the same ones is waited for, at the cache's
        expense.

        Raises:
            OSError: the folder of the cache cannot be written or read, or is full.
        """
        folder = cache_folder("features") / self._name(rows, settings, view)
        if folder not in self._opened:
            with ExitStack() as held:
                before = self.meter.seconds("data")
                with self.meter.phase("data"):
                    held.enter_context(locked(folder))
                self.meter.cache_fill_seconds += self.meter.seconds("data") - before
                with self.meter.phase("data"):
                    entry = _open(folder) or self._fill(folder, rows, settings, view, phase)
                    os.utime(folder)
            seconds = float(entry.manifest.provenance["seconds_per_volume"])
            self._opened[folder] = (entry, seconds)
        return self._opened[folder]

    def all_at_once(
        self, rows: NDArray[np.int64], settings: InputSettings, view: int | None, phase: Phase
    ) -> tuple[Activations, float]:
        """The activations of all `rows` on the device, and the seconds that reading one saves; computed if need be."""
        try:
            if not self.serves(rows, settings, training=view is not None):
                raise OSError(f"the cache has no room for {len(rows)} volumes")
            entry, seconds_per_volume = self.entry(rows, settings, view, phase)
        except OSError as error:
            _log.warning("frozen parts are computed anew, the cache cannot be used: %s", error)
            feed = self.volumes(rows, settings, batch_size=self._at_once, training=False, seed=0, view=view)
            before = self.meter.seconds(phase)
            computed = [_flattened(self.activations(volumes, phase)) for volumes, _ in feed.epoch(0)]
            spent = self.meter.seconds(phase) - before
            self.meter.cache_fill_seconds += spent
            return self.restored(torch.cat(computed)), spent / len(rows)
        with self.meter.phase("data"):
            stored = torch.empty(len(rows), 1, *entry.manifest.shape_dhw, dtype=getattr(torch, entry.manifest.dtype))
            entry.gather(np.arange(len(rows)), stored)
            return self.restored(stored), seconds_per_volume

    def restored(self, stored: torch.Tensor) -> Activations:
        """Activations [B, ...] as the part after the cut takes them, from what a stream of an entry gives."""
        flat = stored.flatten(1).to(self.device, non_blocking=True).float()
        parts = torch.split(flat, [math.prod(shape) for shape in self.cut.shapes], dim=1)
        shaped = [part.reshape(-1, *shape) for part, shape in zip(parts, self.cut.shapes, strict=True)]
        if self._memory_format is torch.channels_last_3d:
            shaped = [x.contiguous(memory_format=torch.channels_last_3d) if x.ndim == 5 else x for x in shaped]
        return shaped if len(shaped) > 1 else shaped[0]

    def volumes(
        self,
        rows: NDArray[np.int64],
        settings: InputSettings,
        *,
        batch_size: int,
        training: bool,
        seed: int,
        view: int | None = None,
    ) -> Feed:
        """The volumes of `rows`, as the network takes them."""
        return Feed(
            self.dataset,
            rows,
            settings,
            batch_size=batch_size,
            training=training,
            seed=seed,
            device=self.device,
            memory_format=self._memory_format,
            meter=self.meter,
            view=view,
        )

    def activations(self, volumes_B1DHW: torch.Tensor, phase: Phase) -> Activations:
        """What the frozen part makes of volumes, computed now."""
        with (
            self.meter.phase(phase),
            self.meter.step("features", tuple(volumes_B1DHW.shape)),
            convolutions(repeatable=True),
            autocast(self.device, self._precision),
        ):
            return run_frozen(self._model, volumes_B1DHW, self.cut.after)

    def _fill(
        self, folder: Path, rows: NDArray[np.int64], settings: InputSettings, view: int | None, phase: Phase
    ) -> Dataset:
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():  # on NFS, while another node still reads it
            raise OSError(f"{folder} cannot be removed")
        make_room(folder.parent, folder, 4 * self.cut.size * len(rows))
        provenance: dict[str, Any] = {"kind": "features", "shapes": self.cut.shapes}

        def particles() -> Iterator[Particle]:
            before = self.meter.seconds(phase)
            yield from self._computed(rows, settings, view, phase)
            spent = self.meter.seconds(phase) - before
            self.meter.cache_fill_seconds += spent
            provenance["seconds_per_volume"] = spent / len(rows)

        # What was computed in half precision is kept in it, unless float16 cannot hold it.
        for dtype in ("float32",) if self._precision == "float32" else ("float16", "float32"):
            try:
                write_dataset(particles(), folder, dtype=dtype, provenance=provenance, volumes_per_shard=_IN_A_SHARD)
                break
            except DataError:
                if dtype == "float32":
                    raise
        return open_dataset(folder)

    def _computed(
        self, rows: NDArray[np.int64], settings: InputSettings, view: int | None, phase: Phase
    ) -> Iterator[Particle]:
        feed = self.volumes(rows, settings, batch_size=self._at_once, training=False, seed=0, view=view)
        classes = self.dataset.manifest.classes
        position = 0
        for volumes_B1DHW, labels_B in feed.epoch(0):
            activations = self.activations(volumes_B1DHW, phase)
            with self.meter.phase(phase):
                flattened = _flattened(activations).cpu().numpy()
            for features, label in zip(flattened, labels_B.tolist(), strict=True):
                yield Particle(
                    particle_id=str(position),
                    label=classes[label],
                    tomogram="",
                    split="",
                    volume_DHW=features.reshape(1, 1, -1),
                    voxel_size_angstrom=self.dataset.manifest.voxel_size_angstrom,
                )
                position += 1

    def _name(self, rows: NDArray[np.int64], settings: InputSettings, view: int | None) -> str:
        framing = self._model.framing
        depends_on = {
            "format": FORMAT,
            "torch": torch.__version__,
            "device": self.device.type,
            "precision": self._precision,
            "memory_format": str(self._memory_format),
            "volumes": self.dataset.manifest.fingerprint,
            "rows": hashlib.sha256(rows.tobytes()).hexdigest(),
            "input": settings.model_dump(mode="json", include=_INPUT_BEFORE_VIEWS),
            "augment": list(settings.augment) if view is not None else [],
            "view": view,
            "framing": [framing.volume_shape_dhw, framing.clip_thw, framing.axes, framing.channels],
            "cut": [self.cut.after, self.cut.shapes],
            "weights": self._weights,
            "code": self._code,
        }
        return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:40]


_INPUT_BEFORE_VIEWS = {"filter", "low_pass_angstrom", "high_pass_angstrom", "normalize"}


class CachedFeed:
    """The batches of a `Feed`, of the same rows in the same order, as activations at a cut instead of volumes."""

    def __init__(
        self,
        cache: FeatureCache,
        rows: NDArray[np.int64],
        settings: InputSettings,
        *,
        batch_size: int,
        training: bool,
        seed: int,
    ) -> None:
        self.after: str | None = cache.cut.after
        self._cache = cache
        self._rows = rows
        self._labels = torch.from_numpy(cache.dataset.labels[rows])
        self._settings = settings
        self._options: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "shuffle": training}
        self._training = training
        self._phase: Phase = "train" if training else "evaluate"
        self._meter = cache.meter
        self._device = cache.device

    def __len__(self) -> int:
        return -(-len(self._rows) // int(self._options["batch_size"]))

    def epoch(self, epoch: int) -> Iterator[tuple[Activations, torch.Tensor]]:
        """The batches of one epoch: activations at the cut and labels [B] int64, both on the device."""
        view = view_of_epoch(self._settings, epoch) if self._training else None
        try:
            entry, seconds_per_volume = self._cache.entry(self._rows, self._settings, view, self._phase)
        except OSError as error:  # a cache that is full or gone costs time, not the trial
            _log.warning("frozen parts are computed in this epoch, the cache cannot be used: %s", error)
            yield from self._computed(epoch)
            return
        with self._meter.phase("data"):
            pinned = self._device.type == "cuda"
            batches = Stream(entry, np.arange(len(entry)), pin_memory=pinned, **self._options).epoch(epoch)
        while True:
            with self._meter.phase("data"):
                batch = next(batches, None)
            if batch is None:
                return
            self._meter.cache_saved_seconds += seconds_per_volume * len(batch)
            labels_B = self._labels[torch.from_numpy(batch.rows_B)].to(self._device, non_blocking=True)
            yield self._cache.restored(batch.volumes_B1DHW), labels_B

    def _computed(self, epoch: int) -> Iterator[tuple[Activations, torch.Tensor]]:
        """The same batches without the cache."""
        batch_size, seed = self._options["batch_size"], self._options["seed"]
        volumes = self._cache.volumes(
            self._rows, self._settings, batch_size=batch_size, training=self._training, seed=seed
        )
        for volumes_B1DHW, labels_B in volumes.epoch(epoch):
            activations = self._cache.activations(volumes_B1DHW, self._phase)
            parts = [part.float() for part in pathways(activations)]
            yield parts if isinstance(activations, list | tuple) else parts[0], labels_B


def _flattened(activations: Activations) -> torch.Tensor:
    return torch.cat([part.flatten(1) for part in pathways(activations)], dim=1).float()


def _open(folder: Path) -> Dataset | None:
    """The entry, if it is there and whole to the last byte."""
    if not folder.exists():
        return None
    try:
        entry = open_dataset(folder)
    except DataError:
        return None
    return None if damaged_shards(folder, entry.manifest, notes=cache_folder("checked")) else entry
