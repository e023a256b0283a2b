"""Datasets: a folder of Parquet shards and a manifest, written whole or not at all, and read by offset."""

from __future__ import annotations

import itertools
import math
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow.parquet as pq

from studytool.data.dataset import Dataset
from studytool.data.manifest import Manifest, ShardEntry, fingerprint_of, read_manifest, write_manifest
from studytool.data.particles import SPLITS, Particle
from studytool.data.shardfile import READ_ERRORS, open_shard, rows_per_group, write_shard
from studytool.errors import DataError, unknown_name
from studytool.files import sha256_of

__all__ = ["Dataset", "Manifest", "ShardEntry", "open_dataset", "read_manifest", "verify_dataset", "write_dataset"]

Item = TypeVar("Item")


def write_dataset(
    particles: Iterable[Particle],
    folder: Path,
    *,
    dtype: str,
    provenance: Mapping[str, Any],
    volumes_per_shard: int,
) -> Manifest:
    """Write `particles` as the dataset `folder`, in bounded memory; until it is whole, nothing stands under that name.

    `dtype` is "float16" or "float32". `provenance` (JSON values) says how the volumes were made.

    Raises:
        DataError: the folder exists, there are no particles, or one of them does not fit: another shape or voxel size
            than the first, values that are not finite or too large for `dtype`, an id that occurs twice, a tomogram in
            two splits.
    """
    census = _Census(dtype)
    entries: list[ShardEntry] = []
    with _whole_folder(folder) as temporary:
        admitted = map(census.admit, particles)
        while (first := next(admitted, None)) is not None:
            path = temporary / f"part-{len(entries):05d}.parquet"
            group_rows = rows_per_group(first.volume_DHW.size * np.dtype(dtype).itemsize)
            in_shard = itertools.chain([first], itertools.islice(admitted, volumes_per_shard - 1))
            rows = write_shard(
                path, _batched(in_shard, group_rows), dtype=dtype, voxel_size_angstrom=first.voxel_size_angstrom
            )
            entries.append(ShardEntry(path.name, rows, path.stat().st_size, sha256_of(path)))
        manifest = census.manifest(entries, provenance, folder)
        write_manifest(temporary, manifest)
    return manifest


def open_dataset(folder: Path) -> Dataset:
    """Open the dataset in `folder`: maps its shards and reads the columns beside the volumes.

    Raises:
        DataError: the manifest or a shard is missing, damaged or contradicts the other (see `open_shard`).
    """
    manifest = read_manifest(folder)
    shards = []
    for entry in manifest.shards:
        path = folder / entry.name
        if not path.is_file():
            raise DataError(f"{path}: missing, though the manifest lists it; fetch the dataset again")
        if path.stat().st_size != entry.bytes:
            raise DataError(f"{path}: has {path.stat().st_size} bytes, the manifest says {entry.bytes}; fetch it again")
        shards.append(open_shard(path, entry.rows, manifest))
    return Dataset(folder, manifest, shards)


def verify_dataset(folder: Path) -> Manifest:
    """Read every byte of the dataset and hold it against its checksums.

    Raises:
        DataError: names the first damaged file and, where it can be told, the row group and its rows.
    """
    manifest = read_manifest(folder)
    for entry in manifest.shards:
        path = folder / entry.name
        if path.is_file() and path.stat().st_size == entry.bytes and sha256_of(path) != entry.sha256:
            raise DataError(f"{path}: {_find_damage(path)}; fetch it or make it again")
    open_dataset(folder)
    return manifest


class _Census:
    """Checks every particle on its way into the shards, and counts what the manifest says."""

    def __init__(self, dtype: str) -> None:
        if dtype not in ("float16", "float32"):
            raise DataError(unknown_name("dtype of shards", dtype, ("float16", "float32")))
        self.dtype: Literal["float16", "float32"] = "float16" if dtype == "float16" else "float32"
        self.largest = float(np.finfo(dtype).max)
        self.first: Particle | None = None
        self.ids: set[str] = set()
        self.split_of: dict[str, str] = {}
        self.counts: Counter[tuple[str, str]] = Counter()

    def admit(self, particle: Particle) -> Particle:
        name = f"particle {particle.particle_id!r}"
        volume = particle.volume_DHW
        self.first = self.first or particle
        if volume.ndim != 3 or volume.shape != self.first.volume_DHW.shape:
            raise DataError(
                f"{name}: shape {list(volume.shape)}; {self.first.particle_id!r} has "
                f"{list(self.first.volume_DHW.shape)}, and a dataset has volumes of one shape: crop or pad"
            )
        if not math.isclose(particle.voxel_size_angstrom, self.first.voxel_size_angstrom, rel_tol=1e-4):
            raise DataError(
                f"{name}: voxel size {particle.voxel_size_angstrom} Å; {self.first.particle_id!r} has "
                f"{self.first.voxel_size_angstrom} Å, and a dataset has one: rescale"
            )
        peak = float(np.abs(volume).max())
        if not math.isfinite(peak):
            raise DataError(f"{name}: {np.count_nonzero(~np.isfinite(volume))} voxels are NaN or infinite")
        if peak > self.largest:
            raise DataError(f"{name}: a voxel of {peak:g} does not fit into {self.dtype}; normalize, or use float32")
        if not particle.label:
            raise DataError(f"{name}: has no label")
        if particle.split not in (*SPLITS, ""):
            raise DataError(f"{name}: {unknown_name('split', particle.split, SPLITS)}")
        if particle.particle_id in self.ids:
            raise DataError(f"{name}: the id occurs twice; ids have to be unique in a dataset")
        if particle.tomogram and self.split_of.setdefault(particle.tomogram, particle.split) != particle.split:
            raise DataError(
                f"{name}: tomogram {particle.tomogram!r} would stand in the splits "
                f"{self.split_of[particle.tomogram]!r} and {particle.split!r}; a tomogram belongs to one"
            )
        self.ids.add(particle.particle_id)
        self.counts[particle.label, particle.split] += 1
        return particle

    def manifest(self, entries: Sequence[ShardEntry], provenance: Mapping[str, Any], folder: Path) -> Manifest:
        if self.first is None:
            raise DataError(f"{folder}: there are no particles to write")
        classes = sorted({label for label, _ in self.counts})
        depth, height, width = self.first.volume_DHW.shape
        return Manifest(
            format_version=1,
            fingerprint=fingerprint_of(entries),
            classes=tuple(classes),
            counts={
                name: {split: self.counts[name, split] for split in (*SPLITS, "") if self.counts[name, split]}
                for name in classes
            },
            tomograms=tuple(sorted(name for name in self.split_of)),
            shape_dhw=(depth, height, width),
            dtype=self.dtype,
            voxel_size_angstrom=float(self.first.voxel_size_angstrom),
            shards=tuple(entries),
            provenance=dict(provenance),
        )


def _find_damage(path: Path) -> str:
    """Say which row group of a file with a wrong checksum is damaged, by the checksums of its pages."""
    first_row = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as parquet:
            for group in range(parquet.metadata.num_row_groups):
                rows = parquet.metadata.row_group(group).num_rows
                try:
                    parquet.read_row_group(group, use_threads=False)
                except READ_ERRORS:
                    return f"row group {group} (rows {first_row} to {first_row + rows - 1}) is damaged"
                first_row += rows
    except READ_ERRORS:
        return "its checksum differs from the manifest's and its footer is damaged"
    return "its checksum differs from the manifest's, though its pages are whole; it was changed after the manifest"


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; on success it is renamed to `folder`, on error removed."""
    taken = DataError(f"{folder}: exists already; choose another folder or remove it")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise taken
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.partial"
    temporary.mkdir(parents=True)
    try:
        yield temporary
        try:
            temporary.rename(folder)
        except OSError as error:
            raise taken from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
