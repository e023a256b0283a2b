"""Strangers' volumes -> a dataset: the source is recognized by its content, then converted by several processes."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import math
import pickletools
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from studytool.data.conform import conform
from studytool.data.importplan import ImportPlan, check_alike, count_oddities, plan_import, read_checked
from studytool.data.manifest import Manifest
from studytool.data.particles import Particle
from studytool.data.readers.source import Entry, ReadOptions, ReadVolume, Source
from studytool.data.shardfile import Group
from studytool.data.shards import Continuable, continue_dataset
from studytool.data.voxels import Array, store
from studytool.data.workers import Slots, results_in_order, shared_slots, usable_cores
from studytool.errors import DataError
from studytool.files import write_text
from studytool.settings import ImportSettings

__all__ = ["READERS", "ImportPlan", "files_of", "import_dataset", "plan_import", "recognize"]

# Module of `studytool.data.readers` -> what it reads; asked in this order, each loaded when its turn comes.
READERS = {
    "shardset": "another studytool dataset",
    "arrays": ".npy or .npz arrays, MedMNIST3D",
    "copick": "copick projects and downloads of the CryoET Data Portal",
    "folders": "a folder with a folder of MRC files per class (or MRC files, or one, with --label), "
    "a CSV path,label[,tomogram]",
    "star": "STAR files of RELION, Warp and M",
    "dynamo": "Dynamo tables (with --volumes)",
    "eman2": "EMAN2 .hdf and .lst",
    "tomograms": "tables of coordinates (with --tomograms)",
    "em": "EM files",
}
_WORTH_PROCESSES = 3000 * 32**3  # voxels; starting processes takes longer than converting fewer
_HEAD_BYTES = 65536
_MAX_FLOAT16_ERROR = 0.01
_TEXT_PICKLE = rb"\(?(?:[dl]p\d+\n|c[\w.]+\n[\w.]+\n(?:p\d+\n|\())"
_FILES_LOOKED_AT = 50
_MOST_SKIPPED = 0.1  # of the volumes
_SKIPPED_NAMED = 5
SKIPPED_NAME = "skipped.csv"
_OPTIONS = tuple(f.name for f in fields(ReadOptions) if f.name not in ("box", "voxel_size_angstrom"))  # of the source


def recognize(path: Path, options: ReadOptions) -> Source:
    """Find the reader of a file or folder by its content.

    Raises:
        DataError: it is not there, no reader knows it, it could run code when it is read, or it has no use for one of
            the options.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if not str(path).isprintable():
        raise DataError(f"{str(path)!a}: a name with characters that cannot be printed or are no UTF-8; rename it")
    if (path.is_dir() and not any(path.iterdir())) or (path.is_file() and not path.stat().st_size):
        raise DataError(f"{path}: an empty {'folder' if path.is_dir() else 'file'}; there is nothing to import")
    _refuse_pickle(path)
    for name in READERS:
        watched = _WatchedOptions(**vars(options))
        source: Source | None = import_module(f"studytool.data.readers.{name}").recognize(path, watched)
        if source is not None:
            _refuse_unused(path, source, options, watched.asked)
            return source
    for file in itertools.islice(sorted(path.iterdir()) if path.is_dir() else (), _FILES_LOOKED_AT):
        _refuse_pickle(file)
    raise DataError(f"{path}: not recognized; what is read: {'; '.join(READERS.values())}")


def import_dataset(
    source: Source,
    out: Path,
    settings: ImportSettings,
    *,
    skip_bad: bool = False,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Convert a source into the dataset `out`; until it is whole, nothing stands under that name.

    An import that was interrupted goes on at its last finished shard when it is called again with the same source, of
    the same sizes and times of change, and the same settings. The result does not depend on `workers` (None: one
    process per core this process may use, if there is enough to do). `on_progress(done, total)` is called as volumes
    are finished. Oddities of files (a missing id, a guessed byte order) do not hinder; `provenance["oddities"]` of the
    manifest counts them and names the first file of each kind, and `provenance["float16_error"]` is the largest error
    of rounding, as a part of a volume's deviation. With `skip_bad` volumes that cannot be read or are not finite are
    left out, up to a tenth of all; `provenance["skipped"]` counts them, and `skipped.csv` in the dataset names them.

    Raises:
        DataError: see `plan_import`; a volume cannot be read, differs from the others or holds values that are not
            finite or that float16 cannot hold; names the file. Too many volumes, or all of a class, would be skipped.
    """
    plan = plan_import(source, settings, skip_bad=skip_bad)
    total = len(plan.entries)
    volume_voxels = math.prod(plan.shape_dhw)
    if workers is None:
        work = total * max(volume_voxels, math.prod(plan.found_shape_dhw))
        workers = usable_cores() if work > _WORTH_PROCESSES else 1
    tally: dict[str, Any] = {"oddities": {}, "float16_error": 0.0, "skipped": []}

    def groups(ranges: Sequence[range], folder: Path) -> Generator[Group]:
        shape = (max(map(len, ranges), default=1), *plan.shape_dhw)
        with shared_slots(folder, shape, settings.dtype, workers=workers) as slots:
            convert = _Converter(source, plan, settings, skip_bad, slots)
            for index, one in enumerate(results_in_order(convert, list(enumerate(ranges)), workers=workers)):
                if on_progress is not None:
                    on_progress(ranges[index].start, total)
                count_oddities(tally["oddities"], one.warnings)
                tally["float16_error"] = max(tally["float16_error"], one.float16_error)
                tally["skipped"] += one.skipped
                if len(tally["skipped"]) > _MOST_SKIPPED * total:
                    raise DataError(_too_many(tally["skipped"], total))
                stored = slots[index][: len(one.found)]
                yield Group(
                    [_particle(plan, *found, volume) for found, volume in zip(one.found, stored, strict=True)], stored
                )

    def finish(folder: Path) -> dict[str, Any]:
        provenance = {
            "kind": "import",
            "source": {"kind": source.kind, **source.provenance},
            "settings": settings.model_dump(mode="json"),
            "notes": list(source.notes),
            "dropped": dict(plan.dropped),
            "found_voxel_size_angstrom": plan.found_voxel_size_angstrom,
            "oddities": tally["oddities"],
            "float16_error": tally["float16_error"],
        }
        if tally["skipped"]:
            provenance["skipped"] = _write_skipped(folder / SKIPPED_NAME, tally["skipped"], plan)
        if on_progress is not None:
            on_progress(total, total)
        return provenance

    key = _key(source, plan.entries, settings, skip_bad)
    volume_bytes = volume_voxels * np.dtype(settings.dtype).itemsize
    return continue_dataset(
        Continuable(key, total, volume_bytes, groups, tally, finish),
        out,
        dtype=settings.dtype,
        volumes_per_shard=settings.volumes_per_shard,
        compression=settings.compression,
    )


@dataclass(frozen=True)
class _Converted:
    """What travels from a worker: numbers of volumes with the voxel sizes they had in Å; the voxels are in a slot."""

    found: list[tuple[int, float]]
    skipped: list[dict[str, str]]
    warnings: list[str]
    float16_error: float


@dataclass(frozen=True)
class _Converter:
    """What a worker process does: read a range of volumes of the plan, make them like the first, and round them."""

    source: Source
    plan: ImportPlan
    settings: ImportSettings
    skip_bad: bool
    slots: Slots

    def __call__(self, item: tuple[int, range]) -> _Converted:
        index, numbers = item
        slot = self.slots[index]
        result = _Converted([], [], [], 0.0)
        largest_error = 0.0
        for number in numbers:
            entry = self.plan.entries[number]
            try:
                read, oddities = read_checked(self.source, entry)
            except DataError as error:
                if not self.skip_bad:
                    raise
                named = {"particle_id": entry.particle_id, "label": entry.label, "reason": str(error)}
                result.skipped.append(named)
                continue
            found, rounding = self.convert(entry, read, slot[len(result.found)])
            result.found.append((number, found))
            result.warnings.extend(oddities)
            largest_error = max(largest_error, rounding)
        return replace(result, float16_error=largest_error)

    def convert(self, entry: Entry, read: ReadVolume, out: Array) -> tuple[float, float]:
        """Round the conformed volume into `out`; its voxel size before in Å, and the error of float16."""
        plan, settings = self.plan, self.settings
        found = check_alike(entry, read, plan.first, plan.found_voxel_size_angstrom, plan.found_shape_dhw, settings)
        volume, _ = conform(read.volume_DHW, found, settings)
        error = _float16_error(entry, volume) if settings.dtype == "float16" else 0.0
        store(volume, out, entry.particle_id)
        return found, error


def _particle(plan: ImportPlan, number: int, found_angstrom: float, stored: Array) -> Particle:
    entry = plan.entries[number]
    voxel_size = plan.voxel_size_angstrom
    position = entry.position_zyx
    if position is not None:  # it counts voxels of the tomogram, whose size becomes that of the volume
        z, y, x = (voxels * found_angstrom / voxel_size for voxels in position)
        position = (z, y, x)
    return Particle(
        particle_id=entry.particle_id,
        label=entry.label,
        tomogram=entry.tomogram,
        split=entry.split,
        volume_DHW=stored,
        voxel_size_angstrom=voxel_size,
        snr=entry.snr,
        position_zyx=position,
    )


def _too_many(skipped: Sequence[Mapping[str, str]], total: int) -> str:
    return (
        f"--skip-bad: {len(skipped)} of {total} volumes cannot be used already, and {_MOST_SKIPPED:.0%} is the most; "
        f"the first: {skipped[0]['reason']}"
    )


def _write_skipped(path: Path, skipped: Sequence[Mapping[str, str]], plan: ImportPlan) -> dict[str, Any]:
    """Name every skipped volume in a CSV; what the manifest says of them.

    Raises:
        DataError: no volume of a class is left.
    """
    lost = Counter(one["label"] for one in skipped)
    for label, count in lost.items():
        if count == plan.counts[label]:
            first = next(one["reason"] for one in skipped if one["label"] == label)
            raise DataError(
                f"--skip-bad: none of the {count} volumes of class {label!r} can be used; leave it out with --exclude, "
                f"or mend them; the first: {first}"
            )
    text = io.StringIO()
    writer = csv.DictWriter(text, ["particle_id", "label", "reason"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(skipped)
    write_text(path, text.getvalue())
    return {"volumes": len(skipped), "first": [one["reason"] for one in skipped[:_SKIPPED_NAMED]], "file": path.name}


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


def _key(source: Source, entries: Sequence[Entry], settings: ImportSettings, skip_bad: bool) -> str:
    """A digest of all that the dataset depends on: the list, the settings, and the state of every file named in it."""
    digest = hashlib.sha256(json.dumps([source.kind, skip_bad, settings.model_dump(mode="json")]).encode())
    for entry in entries:
        digest.update(repr(entry).encode())
    for path in files_of(source, entries):
        if path.exists():
            state = path.stat()
            digest.update(f"{path!a}|{state.st_size}|{state.st_mtime_ns}".encode())
    return digest.hexdigest()


def files_of(source: Source, entries: Sequence[Entry]) -> list[Path]:
    """Every path that a source and its entries name, each once."""
    files = dict.fromkeys(_paths_in([getattr(source, name) for name in _own_fields(source)]))
    for entry in entries:
        files.update(dict.fromkeys(_paths_in(entry.where)))
    return list(files)


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


class _WatchedOptions(ReadOptions):
    """Options that remember which of them a reader has asked for."""

    def __getattribute__(self, name: str) -> Any:
        if name in _OPTIONS:
            self.asked.add(name)
        return super().__getattribute__(name)

    @cached_property
    def asked(self) -> set[str]:
        return set()


def _refuse_unused(path: Path, source: Source, options: ReadOptions, asked: set[str]) -> None:
    # A label of "" stands for a prediction, which wants none from any source.
    unused = [name for name in _OPTIONS if getattr(options, name) not in (None, "") and name not in asked]
    if unused:
        names = ", ".join("--" + name.replace("_", "-") for name in unused)
        raise DataError(f"{path}: read as {source.kind}, which has no use for {names}; leave it out")


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
