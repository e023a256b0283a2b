"""Datasets: a folder of Parquet shards and a manifest, written whole or not at all, and read by offset."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import pyarrow.parquet as pq

from studytool.data.dataset import Dataset
from studytool.data.manifest import Manifest, ShardEntry, fingerprint_of, read_manifest, write_manifest
from studytool.data.partial import empty_folder, whole_folder
from studytool.data.particles import SPLITS, STORED, Particle
from studytool.data.scan import scan
from studytool.data.shardfile import READ_ERRORS, TEXT_COLUMNS, Group, open_shard, rows_per_group, write_shard
from studytool.data.splits import read_split
from studytool.data.voxels import DTYPES, store
from studytool.errors import DataError, unknown_name
from studytool.files import sha256_of, write_json
from studytool.settings import Compression, Dtype

__all__ = [
    "Continuable",
    "Dataset",
    "Manifest",
    "ShardEntry",
    "continue_dataset",
    "open_dataset",
    "read_manifest",
    "verify_dataset",
    "write_dataset",
]

_JOURNAL = "journal.json"

Item = TypeVar("Item")


def write_dataset(
    particles: Iterable[Particle],
    folder: Path,
    *,
    dtype: str,
    provenance: Mapping[str, Any],
    volumes_per_shard: int,
    compression: Compression = "none",
) -> Manifest:
    """Write `particles` as the dataset `folder`, in bounded memory; until it is whole, nothing stands under that name.

    `dtype` is one of `voxels.DTYPES`. `provenance` (JSON values) says how the volumes were made.

    Raises:
        DataError: the folder exists, there are no particles, or one of them does not fit: another shape or voxel size
            than the first, values that are not finite or too large for `dtype`, an id that occurs twice, a tomogram in
            two splits.
    """
    with whole_folder(folder) as temporary:
        writer = _Writer(temporary, dtype, compression)
        admitted = map(writer.census.admit, particles)
        while in_shard := list(itertools.islice(admitted, 1)):
            volume = in_shard[0].volume_DHW
            rest = itertools.islice(admitted, volumes_per_shard - 1)
            size = rows_per_group(volume.size * np.dtype(dtype).itemsize)
            writer.write(_stored(batch, dtype) for batch in _batched(itertools.chain(in_shard, rest), size))
        manifest = writer.manifest(provenance, folder)
        write_manifest(temporary, manifest)
    return manifest


@dataclass(frozen=True)
class Continuable:
    """Numbered particles whose writing may be interrupted and go on in another process.

    `key` says what they are made of: only what was written under the same key is continued. `groups(ranges, folder)`
    gives a group for each range of numbers, with fewer particles (or none) where some are left out, and may keep
    hidden files of its own in `folder` meanwhile; a group's memory is in use until the next one is asked for.
    `tally` are JSON values that the caller updates as it makes groups; they are stored with each shard and put back in
    place when its work is continued. `finish(folder)` is called when all shards are written: it may add files, or
    refuse, and gives the manifest's provenance.
    """

    key: str
    total: int
    volume_bytes: int
    groups: Callable[[Sequence[range], Path], Generator[Group]]
    tally: dict[str, Any]
    finish: Callable[[Path], Mapping[str, Any]]


def continue_dataset(
    source: Continuable,
    folder: Path,
    *,
    dtype: str,
    volumes_per_shard: int,
    compression: Compression = "none",
) -> Manifest:
    """Write a dataset as `write_dataset` does, or go on where an interrupted call with the same key stopped.

    An interruption leaves finished shards and a journal of them in the hidden folder `.NAME.partial` beside `folder`.

    Raises:
        DataError: as `write_dataset`; what was written is then removed.
    """
    with whole_folder(folder, journal=_JOURNAL) as temporary:
        writer = _Writer(temporary, dtype, compression)
        done = writer.take_up(source)
        if not done:
            empty_folder(temporary)
        shards = _ranges(range(done, source.total), volumes_per_shard)
        size = rows_per_group(source.volume_bytes)
        with closing(source.groups([part for shard in shards for part in _ranges(shard, size)], temporary)) as groups:
            for shard in shards:
                in_shard = itertools.islice(groups, len(_ranges(shard, size)))
                writer.write(map(writer.admit_all, in_shard))
                writer.note(source, shard.stop)
        manifest = writer.manifest(source.finish(temporary), folder)
        write_manifest(temporary, manifest)
        (temporary / _JOURNAL).unlink()
    return manifest


def open_dataset(folder: Path, split: str = STORED) -> Dataset:
    """Open the dataset in `folder`: maps its shards and reads the columns beside the volumes.

    `split` names the split its `splits` are: "stored", the one that came with it, or one of `studytool.data.splits`.

    Raises:
        DataError: the manifest or a shard is missing, damaged or contradicts the other (see `open_shard`), or there is
            no such split.
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
    dataset = Dataset(folder, manifest, shards)
    if split != STORED:
        dataset.use_splits(*read_split(folder, manifest, split))
    return dataset


def verify_dataset(folder: Path) -> Manifest:
    """Read every byte of the dataset and hold it against its checksums, its counts and what a volume may hold.

    Raises:
        DataError: names the first damaged file and, where it can be told, the row group and its rows, or the row of a
            volume with voxels that are not finite.
    """
    manifest = read_manifest(folder)
    for entry in manifest.shards:
        path = folder / entry.name
        if path.is_file() and path.stat().st_size == entry.bytes and sha256_of(path) != entry.sha256:
            raise DataError(f"{path}: {_find_damage(path)}; fetch it or make it again")
    dataset = open_dataset(folder)
    for rows, volumes in scan(dataset):
        finite = np.isfinite(volumes).reshape(len(rows), -1).all(axis=1)
        if not finite.all():
            bad = int(finite.argmin())
            raise DataError(
                f"{dataset.place(int(rows[bad]))}: {np.count_nonzero(~np.isfinite(volumes[bad]))} voxels of its volume "
                "are NaN or infinite; make the dataset again without it"
            )
    return manifest


class _Writer:
    """Writes shards one after the other, and keeps a journal of them for what can be continued."""

    def __init__(self, folder: Path, dtype: str, compression: Compression) -> None:
        self.folder = folder
        self.compression = compression
        self.census = _Census(dtype)
        self.entries: list[ShardEntry] = []

    def write(self, groups: Iterator[Group]) -> None:
        """Write the next shard, if there is a particle for it."""
        filled = (group for group in groups if group.particles)
        first = next(filled, None)
        if first is not None:
            path = self.folder / f"part-{len(self.entries):05d}.parquet"
            self.entries.append(write_shard(path, itertools.chain([first], filled), compression=self.compression))

    def admit_all(self, group: Group) -> Group:
        for particle in group.particles:
            self.census.admit(particle)
        return group

    def note(self, source: Continuable, done: int) -> None:
        """Write into the journal that the numbers before `done` are in the shards."""
        shards = [asdict(entry) for entry in self.entries]
        write_json(self.folder / _JOURNAL, {"key": source.key, "done": done, "tally": source.tally, "shards": shards})

    def take_up(self, source: Continuable) -> int:
        """Take the finished shards of a writer before for one's own, if they are whole and of the same key.

        Returns how many numbers they account for.
        """
        try:
            journal = json.loads((self.folder / _JOURNAL).read_text(encoding="utf-8"))
            if journal["key"] != source.key:
                return 0
            done = int(journal["done"])
            entries = [ShardEntry(**entry) for entry in journal["shards"]]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return 0
        shards = [self.folder / entry.name for entry in entries]
        if not all(p.is_file() and sha256_of(p) == e.sha256 for p, e in zip(shards, entries, strict=True)):
            return 0
        for particle in itertools.chain.from_iterable(map(_without_volumes, shards)):
            self.census.admit(particle)
        self.entries = entries
        source.tally.update(journal["tally"])
        for path in self.folder.glob("part-*.parquet"):
            if path not in shards:
                path.unlink()
        return done

    def manifest(self, provenance: Mapping[str, Any], folder: Path) -> Manifest:
        return self.census.manifest(self.entries, provenance, folder)


class _Census:
    """Checks every particle on its way into the shards, and counts what the manifest says."""

    def __init__(self, dtype: str) -> None:
        if dtype not in DTYPES:
            raise DataError(unknown_name("dtype of shards", dtype, DTYPES))
        self.dtype: Dtype = cast(Dtype, dtype)
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


def _without_volumes(path: Path) -> Iterator[Particle]:
    """The particles of a shard of one's own as the census wants to know them: their voxels are all zero."""
    table = pq.read_table(path, columns=list(TEXT_COLUMNS), use_threads=False)
    stated = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    shape_dhw = tuple(map(int, stated["studytool.shape_dhw"].split(",")))
    zeros = np.broadcast_to(np.float32(0), shape_dhw)
    voxel_size_angstrom = float(stated["studytool.voxel_size_angstrom"])
    for row in table.to_pylist():
        yield Particle(**row, volume_DHW=zeros, voxel_size_angstrom=voxel_size_angstrom)


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


def _stored(particles: Sequence[Particle], dtype: str) -> Group:
    stored = np.empty((len(particles), *particles[0].volume_DHW.shape), dtype)
    for place, particle in zip(stored, particles, strict=True):
        store(particle.volume_DHW, place, particle.particle_id)
    return Group(particles, stored)


def _ranges(numbers: range, size: int) -> list[range]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def _batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
