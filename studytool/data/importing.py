"""Strangers' volumes -> a dataset: the source is recognized by its content, then converted by several processes."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import pickletools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from studytool.data.conform import conform
from studytool.data.importplan import ImportPlan, check_alike, count_oddities, plan_import, read_checked
from studytool.data.manifest import Manifest
from studytool.data.particles import Particle
from studytool.data.readers.source import Entry, ReadOptions, Source
from studytool.data.shards import Continuable, continue_dataset
from studytool.data.workers import results_in_order, usable_cores
from studytool.errors import DataError
from studytool.settings import ImportSettings

__all__ = ["READERS", "ImportPlan", "import_dataset", "plan_import", "recognize"]

# Module of `studytool.data.readers` -> what it reads; asked in this order, each loaded when its turn comes.
READERS = {
    "shardset": "another studytool dataset",
    "arrays": ".npy or .npz arrays, MedMNIST3D",
    "copick": "copick projects and downloads of the CryoET Data Portal",
    "folders": "a folder with a folder of MRC files per class (or MRC files with --label), a CSV path,label[,tomogram]",
    "star": "STAR files of RELION, Warp and M",
    "dynamo": "Dynamo tables (with --volumes)",
    "eman2": "EMAN2 .hdf and .lst",
    "tomograms": "tables of coordinates (with --tomograms)",
    "em": "EM files",
}
_CHUNK_BYTES = 4 * 1024 * 1024  # of volumes that travel between processes at once
_MAX_CHUNK = 64
_WORTH_PROCESSES = 6000 * 32**3  # voxels; starting processes takes longer than converting fewer
_PROGRESS_EVERY = 16
_HEAD_BYTES = 65536
_MAX_FLOAT16_ERROR = 0.01
_TEXT_PICKLE = rb"\(?(?:[dl]p\d+\n|c[\w.]+\n[\w.]+\n(?:p\d+\n|\())"
_FILES_LOOKED_AT = 50


def recognize(path: Path, options: ReadOptions) -> Source:
    """Find the reader of a file or folder by its content.

    Raises:
        DataError: it is not there, no reader knows it, or it could run code when it is read.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if not str(path).isprintable():
        raise DataError(f"{str(path)!a}: a name with characters that cannot be printed or are no UTF-8; rename it")
    if (path.is_dir() and not any(path.iterdir())) or (path.is_file() and not path.stat().st_size):
        raise DataError(f"{path}: an empty {'folder' if path.is_dir() else 'file'}; there is nothing to import")
    _refuse_pickle(path)
    for name in READERS:
        source: Source | None = import_module(f"studytool.data.readers.{name}").recognize(path, options)
        if source is not None:
            return source
    for file in itertools.islice(sorted(path.iterdir()) if path.is_dir() else (), _FILES_LOOKED_AT):
        _refuse_pickle(file)
    raise DataError(f"{path}: not recognized; what is read: {'; '.join(READERS.values())}")


def import_dataset(
    source: Source,
    out: Path,
    settings: ImportSettings,
    *,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Convert a source into the dataset `out`; until it is whole, nothing stands under that name.

    An import that was interrupted goes on at its last finished shard when it is called again with the same source, of
    the same sizes and times of change, and the same settings. The result does not depend on `workers` (None: one
    process per core this process may use, if there is enough to do). `on_progress(done, total)` is called as volumes
    are finished. Oddities of files (a missing id, a guessed byte order) do not hinder; `provenance["oddities"]` of the
    manifest counts them and names the first file of each kind, and `provenance["float16_error"]` is the largest error
    of rounding, as a part of a volume's deviation.

    Raises:
        DataError: see `plan_import`; a volume cannot be read, differs from the others or holds values that are not
            finite or that float16 cannot hold; names the file.
    """
    plan = plan_import(source, settings)
    total = len(plan.entries)
    volume_voxels = math.prod(plan.shape_dhw)
    if workers is None:
        work = total * max(volume_voxels, math.prod(plan.found_shape_dhw))
        workers = usable_cores() if work > _WORTH_PROCESSES else 1
    chunk = max(1, min(_MAX_CHUNK, _CHUNK_BYTES // (4 * volume_voxels)))
    tally: dict[str, Any] = {"oddities": {}, "float16_error": 0.0}

    def particles_from(start: int) -> Iterator[Particle]:
        convert = _Converter(source, plan, settings)
        converted = results_in_order(convert, range(start, total), workers=workers, chunk=chunk)
        for done, one in enumerate(converted, start=start + 1):
            count_oddities(tally["oddities"], one.warnings)
            tally["float16_error"] = max(tally["float16_error"], one.float16_error)
            yield one.particle
            if on_progress is not None and (done % _PROGRESS_EVERY == 0 or done == total):
                on_progress(done, total)

    provenance = {
        "kind": "import",
        "source": {"kind": source.kind, **source.provenance},
        "settings": settings.model_dump(mode="json"),
        "notes": list(source.notes),
        "dropped": dict(plan.dropped),
        "found_voxel_size_angstrom": plan.found_voxel_size_angstrom,
    }
    key = _key(source, plan.entries, settings)
    return continue_dataset(
        Continuable(key, particles_from, tally),
        out,
        dtype=settings.dtype,
        provenance=provenance,
        volumes_per_shard=settings.volumes_per_shard,
        compression=settings.compression,
    )


@dataclass(frozen=True)
class _Converted:
    particle: Particle
    warnings: tuple[str, ...]
    float16_error: float


@dataclass(frozen=True)
class _Converter:
    """What a worker process does: read a volume of the plan and make it like the first."""

    source: Source
    plan: ImportPlan
    settings: ImportSettings

    def __call__(self, number: int) -> _Converted:
        plan = self.plan
        entry = plan.entries[number]
        read, oddities = read_checked(self.source, entry)
        found = check_alike(
            entry, read, plan.entries[0], plan.found_voxel_size_angstrom, plan.found_shape_dhw, self.settings
        )
        volume, voxel_size = conform(read.volume_DHW, found, self.settings)
        position = entry.position_zyx
        if position is not None:  # it counts voxels of the tomogram, whose size becomes that of the volume
            z, y, x = (voxels * found / voxel_size for voxels in position)
            position = (z, y, x)
        particle = Particle(
            particle_id=entry.particle_id,
            label=entry.label,
            tomogram=entry.tomogram,
            split=entry.split,
            volume_DHW=volume,
            voxel_size_angstrom=voxel_size,
            snr=entry.snr,
            position_zyx=position,
        )
        error = _float16_error(entry, volume) if self.settings.dtype == "float16" else 0.0
        return _Converted(particle, oddities, error)


def _float16_error(entry: Entry, volume: Any) -> float:
    """The root mean square of what float16 changes, as a part of the deviation, taken from a row of voxels in sixteen.

    Raises:
        DataError: it is more than can be borne.
    """
    part = np.ascontiguousarray(volume[::4, ::4]).ravel()
    with np.errstate(over="ignore", invalid="ignore"):
        deviation = float(part.std())
        change = part - part.astype(np.float16)
        error = math.sqrt(float(np.vdot(change, change)) / change.size) / deviation if deviation > 0 else 0.0
    if not error <= _MAX_FLOAT16_ERROR:  # so that it may be NaN
        raise DataError(
            f"{entry.origin}: float16 would change its values (deviation {deviation:.3g}) by {error:.1%} of their "
            "deviation; choose --normalize standard or --dtype float32"
        )
    return error


def _key(source: Source, entries: Sequence[Entry], settings: ImportSettings) -> str:
    """A digest of all that the dataset depends on: the list, the settings, and the state of every file named in it."""
    digest = hashlib.sha256(json.dumps([source.kind, settings.model_dump(mode="json")]).encode())
    files: dict[Path, None] = dict.fromkeys(_paths_in([getattr(source, name) for name in _own_fields(source)]))
    for entry in entries:
        digest.update(repr(entry).encode())
        files.update(dict.fromkeys(_paths_in(entry.where)))
    for path in files:
        if path.exists():
            state = path.stat()
            digest.update(f"{path!a}|{state.st_size}|{state.st_mtime_ns}".encode())
    return digest.hexdigest()


def _own_fields(source: Source) -> list[str]:
    return [name for name in getattr(source, "__dict__", {}) if name != "entries"]


def _paths_in(value: Any) -> Iterator[Path]:
    """The paths in whatever a reader keeps as its reference to a volume."""
    if isinstance(value, Path):
        yield value
    elif isinstance(value, Mapping):
        yield from _paths_in(list(value.values()))
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from _paths_in(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _paths_in(getattr(value, field.name))


def _refuse_pickle(path: Path) -> None:
    if not path.is_file():
        return
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if _is_pickle(head):
        raise DataError(
            f"{path}: a Python pickle, as AITom writes them, which can run code when it is read; if you trust it, load "
            "it in the program that made it and write numpy.savez('particles.npz', volumes=..., labels=...) to import"
        )


def _is_pickle(head: bytes) -> bool:
    if re.match(_TEXT_PICKLE, head):
        return True
    if head[:1] != b"\x80":
        return False
    try:  # an MRC file of 640 columns begins with the same two bytes, but not with three operations
        return len(list(itertools.islice(pickletools.genops(io.BytesIO(head)), 3))) == 3
    except (ValueError, UnicodeDecodeError):
        return False
