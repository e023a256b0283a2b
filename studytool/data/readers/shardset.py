"""Another studytool dataset as a source: its ids, labels, tomograms, splits, SNR and positions are kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from studytool.data.dataset import Dataset
from studytool.data.manifest import MANIFEST_NAME
from studytool.data.readers.source import NO_TOMOGRAM_NOTE, Entry, Listing, ReadOptions, ReadVolume
from studytool.data.shards import open_dataset
from studytool.data.voxels import widened
from studytool.errors import DataError
from studytool.files import sha256_of

_HEAD_BYTES = 4096


@dataclass(frozen=True)
class ShardSet(Listing):
    """A dataset folder as a source; an entry's `where` is its row number."""

    folder: Path

    def read(self, entry: Entry) -> ReadVolume:
        """Read the volume of one entry; a shard is held against its checksum before its first volume is read.

        Raises:
            DataError: the shard is damaged.
        """
        dataset = _opened(self.folder, self.provenance["fingerprint"])
        shard, row = 0, entry.where
        while row >= dataset.manifest.shards[shard].rows:
            row -= dataset.manifest.shards[shard].rows
            shard += 1
        _check_shard(self.folder, dataset.manifest.shards[shard].name, dataset.manifest.shards[shard].sha256)
        stored = np.empty((1, *dataset.manifest.shape_dhw), dtype=dataset.manifest.dtype)
        dataset.gather(np.array([entry.where]), stored)
        return ReadVolume(widened(stored[0]), dataset.manifest.voxel_size_angstrom)


def recognize(path: Path, options: ReadOptions) -> ShardSet | None:
    """A folder with the manifest of a studytool dataset.

    Raises:
        DataError: the dataset is damaged, or of another format version.
    """
    del options  # a dataset tells everything itself
    manifest_path = path / MANIFEST_NAME
    if not manifest_path.is_file():
        return None
    with manifest_path.open("rb") as file:
        if b'"fingerprint"' not in file.read(_HEAD_BYTES):
            return None
    dataset = open_dataset(path)
    manifest = dataset.manifest
    return ShardSet(
        kind="studytool dataset",
        entries=_entries(path, dataset),
        notes=() if all(dataset.tomograms) else (NO_TOMOGRAM_NOTE,),
        provenance={"path": str(path), "fingerprint": manifest.fingerprint, "provenance": manifest.provenance},
        folder=path,
    )


def _entries(path: Path, dataset: Dataset) -> tuple[Entry, ...]:
    classes = dataset.manifest.classes
    columns = zip(
        dataset.particle_ids.tolist(),
        dataset.labels.tolist(),
        dataset.tomograms.tolist(),
        dataset.splits.tolist(),
        dataset.snr.tolist(),
        dataset.positions_zyx.tolist(),
        strict=True,
    )
    return tuple(
        Entry(
            particle_id=particle_id,
            label=classes[label],
            tomogram=tomogram,
            where=row,
            origin=f"{path}, particle {particle_id!r}",
            split=split,
            snr=None if math.isnan(snr) else snr,
            position_zyx=None if math.isnan(position[0]) else (position[0], position[1], position[2]),
        )
        for row, (particle_id, label, tomogram, split, snr, position) in enumerate(columns)
    )


@lru_cache(maxsize=2)
def _opened(folder: Path, fingerprint: str) -> Dataset:
    """The dataset, opened once by each process."""
    dataset = open_dataset(folder)
    if dataset.manifest.fingerprint != fingerprint:
        raise DataError(f"{folder}: was exchanged for another dataset while it was read")
    return dataset


@lru_cache(maxsize=4096)
def _check_shard(folder: Path, name: str, sha256: str) -> None:
    if sha256_of(folder / name) != sha256:
        raise DataError(f"{folder / name}: its checksum differs from the manifest's; see `studytool data verify`")
