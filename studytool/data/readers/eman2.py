"""Volumes in EMAN2's HDF5 files, and `.lst` files that list volumes in such files or in MRC stacks.

Layout: group `MDF/images/<n>` with the dataset `image` (z, y, x) and attributes `EMAN.…`; an `.lst` file has lines of
image number (from 0), file and, if any, a comment or JSON, each after a tab (https://eman2.org, `EMAN2/Lst`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from studytool.data.readers.mrcstack import count_volumes, read_volume_of_stack
from studytool.data.readers.source import NO_TOMOGRAM_NOTE, Entry, Listing, ReadOptions, ReadVolume, named
from studytool.data.readers.tables import head_of_text, lines_of_text, locate_files, require_unique
from studytool.errors import DataError, unknown_name

_TOMOGRAM = "ptcl_source_image"  # what EMAN2 notes when it cuts particles from a tomogram
_PIXEL_SIZES = frozenset({"apix_x", "apix_y", "apix_z"})
_NUMBER = re.compile(r"\d{1,18}", re.ASCII)
_LST_HEADS = ("#LSX", "#LST")
_MAX_EXPANSION = 1000  # a volume worth reading does not shrink to less than a thousandth
_MAX_ATTRIBUTE_BYTES = 65536
_FILTERS = {1: "deflate", 2: "shuffle", 3: "fletcher32", 4: "szip", 5: "nbit", 6: "scaleoffset"}

Properties = dict[str, str | None]  # None: there, but not asked for and so not read


def recognize(path: Path, options: ReadOptions) -> Eman2Source | None:
    """An HDF5 file of EMAN2 or an `.lst` file; None where `path` is neither.

    Labels are an attribute or a key of the JSON by `options.label_column`, or `options.label`; the tomogram is one by
    `options.group_column`, else EMAN2's note of where the particle was cut.

    Raises:
        DataError: the file is damaged, a line names no image that is there, or an attribute that was asked for is
            missing; names the image or the line.
    """
    if options.tomograms is not None or not path.is_file():
        return None
    if _is_hdf5(path):
        return _stack(path, options)
    if any(line.startswith(_LST_HEADS) for line in head_of_text(path)[:1]):
        return _list(path, options)
    return None


class Eman2Source(Listing):
    """Volumes in EMAN2's files; `where` is the file and the image's number (from 0) in it."""

    def read(self, entry: Entry) -> ReadVolume:
        """Read the volume of one entry.

        Raises:
            DataError: names the image or the line of the list, and what is wrong with it.
        """
        path, number = entry.where
        with named(entry):
            if _is_hdf5(path):
                with _opened(path) as file:
                    return _read_image(path, _images(path, file), number)
            mrc = read_volume_of_stack(path, number + 1)
        return ReadVolume(mrc.volume_DHW, mrc.voxel_size_angstrom)


def _stack(path: Path, options: ReadOptions) -> Eman2Source | None:
    with _opened(path) as file:
        if not _has(file, "MDF"):
            return None  # HDF5 of some other program
        images = _images(path, file)
        numbers = _numbers(images)
        if not numbers:
            raise DataError(f"{path}: no images in MDF/images")
        entries = []
        for number in numbers:
            origin = f"{path}, image {number}"
            properties = _properties(_member(path, images, str(number), h5py.Group), _asked(options))
            name = f"{number}@{path.name}"
            entries.append(_entry(name, (path, number), origin, properties, options))
    kind = "EMAN2 HDF5 file"
    return Eman2Source(kind, entries, _notes(entries), {"source": kind, "path": str(path)})


def _list(path: Path, options: ReadOptions) -> Eman2Source:
    lines = [line for line in lines_of_text(path) if line[1] and not line[1].startswith("#")]
    if not lines:
        raise DataError(f"{path}: the list names no images")
    rows = [_row(f"{path}, line {number}", line) for number, line in lines]
    found = locate_files(path, [row.file for row in rows], options.root)
    in_file: dict[Path, dict[int, Properties]] = {}
    entries = []
    for row, file, (line, _) in zip(rows, found.paths, lines, strict=True):
        origin = f"{path}, line {line}"
        if file not in in_file:
            try:
                in_file[file] = _contents(file, _asked(options))
            except DataError as error:
                raise DataError(f"{origin}: {error}") from error
        if row.number not in in_file[file]:
            raise DataError(f"{origin}: {row.file} has no image {row.number}; it has {len(in_file[file])} (from 0)")
        properties = in_file[file][row.number] | row.properties
        entries.append(_entry(f"{row.number}@{row.file}", (file, row.number), origin, properties, options))
    require_unique(path, [entry.particle_id for entry in entries])
    kind = "EMAN2 list of images"
    return Eman2Source(
        kind,
        entries,
        (*found.notes, *_notes(entries)),
        {"source": kind, "path": str(path), "root": str(found.root)},
    )


@dataclass(frozen=True)
class _Row:
    number: int
    file: str
    properties: Properties


def _row(where: str, line: str) -> _Row:
    fields = [text.strip() for text in (line.split("\t") if "\t" in line else line.split(maxsplit=2))]
    if len(fields) < 2 or not _NUMBER.fullmatch(fields[0]) or not fields[1]:
        raise DataError(f"{where}: {line[:60]!r}; it has to be an image's number, a tab and a file")
    properties: Properties = {}
    if len(fields) > 2 and fields[2].startswith("{"):
        try:
            found = json.loads(fields[2])
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: what follows the file is no JSON: {fields[2][:60]!r}") from error
        properties = {key: str(value) for key, value in found.items() if isinstance(value, str | int | float)}
    return _Row(int(fields[0]), fields[1], properties)


def _contents(path: Path, asked: AbstractSet[str]) -> dict[int, Properties]:
    """The images of a file, with what it says of each."""
    if not _is_hdf5(path):
        return {number: {} for number in range(count_volumes(path))}
    with _opened(path) as file:
        images = _images(path, file)
        groups = {number: _member(path, images, str(number), h5py.Group) for number in _numbers(images)}
        return {number: _properties(image, asked) for number, image in groups.items()}


def _asked(options: ReadOptions) -> AbstractSet[str]:
    """The attributes that a listing needs; an image has dozens, and reading all takes longer than reading it."""
    columns = (options.label_column, options.group_column)
    return {_TOMOGRAM, *(column.removeprefix("EMAN.") for column in columns if column is not None)}


def _entry(name: str, where: tuple[Path, int], origin: str, properties: Properties, options: ReadOptions) -> Entry:
    label = options.label or ""
    if options.label_column is not None:
        label = _property(origin, properties, options.label_column)
    tomogram = properties.get(_TOMOGRAM) or ""
    if options.group_column is not None:
        tomogram = _property(origin, properties, options.group_column)
    return Entry(particle_id=name, label=label, tomogram=tomogram, where=where, origin=origin)


def _property(origin: str, properties: Properties, asked: str) -> str:
    value = properties.get(asked.removeprefix("EMAN."))
    if value is None:
        raise DataError(f"{origin}: {unknown_name('attribute', asked, properties)}")
    return value


def _notes(entries: Sequence[Entry]) -> tuple[str, ...]:
    return () if all(entry.tomogram for entry in entries) else (NO_TOMOGRAM_NOTE,)


def _is_hdf5(path: Path) -> bool:
    try:
        return bool(h5py.is_hdf5(path))
    except OSError:
        return False


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file, read only; whatever the library finds damaged in it becomes one line."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path}: cannot be read as HDF5: {str(error).splitlines()[0]}") from error


def _images(path: Path, file: h5py.File) -> h5py.Group:
    return _member(path, _member(path, file, "MDF", h5py.Group), "images", h5py.Group)


def _numbers(images: h5py.Group) -> list[int]:
    return sorted(int(name) for name in images if name.isdecimal() and str(int(name)) == name)


def _member(path: Path, group: h5py.Group, name: str, kind: type) -> Any:
    """What lies in this very file under a name; links, which may lead to any other file, are not followed."""
    if not _has(group, name):
        raise DataError(f"{path}: {group.name} has no {name}")
    if group.id.links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
        raise DataError(f"{path}: {name} in {group.name} is a link to elsewhere, which is not followed")
    found = group[name]
    if not isinstance(found, kind):
        raise DataError(f"{path}: {name} in {group.name} is no {kind.__name__.lower()}")
    return found


def _has(group: h5py.Group, name: str) -> bool:
    """As `name in group`, which would follow a link."""
    return bool(group.id.links.exists(name.encode()))


def _properties(image: h5py.Group, asked: AbstractSet[str]) -> Properties:
    """The attributes of an image without EMAN2's prefix; those asked for are read if they are one number or text."""
    properties: Properties = {}
    for attribute in image.attrs:
        name = attribute.removeprefix("EMAN.")
        if name not in asked:
            properties[name] = None
            continue
        identifier = image.attrs.get_id(attribute)
        kind = identifier.dtype
        one = math.prod(identifier.shape or (1,)) == 1 and kind.itemsize <= _MAX_ATTRIBUTE_BYTES
        if one and (kind.kind in "fiuS" or h5py.check_string_dtype(kind) is not None):
            value = np.asarray(image.attrs[attribute]).reshape(-1)[0]
            properties[name] = value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)
    return properties


def _read_image(path: Path, images: h5py.Group, number: int) -> ReadVolume:
    image = _member(path, images, str(number), h5py.Group)
    dataset = _member(path, image, "image", h5py.Dataset)
    _check_dataset(path, dataset)
    volume = np.asarray(dataset[()], dtype=np.float32)
    return ReadVolume(volume, _voxel_size_angstrom(_properties(image, _PIXEL_SIZES)))


def _check_dataset(path: Path, dataset: h5py.Dataset) -> None:
    where = f"{path}, {dataset.name}"
    if dataset.dtype.kind not in "fiu":
        raise DataError(f"{where}: values of type {dataset.dtype}; a volume has real numbers")
    if dataset.ndim != 3 or min(dataset.shape) < 2:
        raise DataError(f"{where}: an array of {' x '.join(map(str, dataset.shape))}, not a volume")
    if dataset.is_virtual or dataset.external:
        raise DataError(f"{where}: its values lie in other files, which are not read; copy them into one file")
    layout = dataset.id.get_create_plist()
    filters = {layout.get_filter(index)[0] for index in range(layout.get_nfilters())}
    if filters - _FILTERS.keys():
        raise DataError(
            f"{where}: packed with HDF5 filter {min(filters - _FILTERS.keys())}; {', '.join(_FILTERS.values())} can be "
            "read: write it again with one of them"
        )
    size = path.stat().st_size
    claimed = math.prod(dataset.shape) * dataset.dtype.itemsize
    chunk = math.prod(dataset.chunks or (0,)) * dataset.dtype.itemsize
    stored = dataset.id.get_storage_size()
    most = _MAX_EXPANSION * stored if dataset.chunks else stored
    if max(claimed, chunk) > most or stored > size or (dataset.id.get_offset() or 0) + (0 if chunk else claimed) > size:
        raise DataError(
            f"{where}: claims {' x '.join(map(str, dataset.shape))} voxels, that is {claimed} bytes, of which {stored} "
            f"are stored in a file of {size}; it was never written whole, or it is damaged"
        )


def _voxel_size_angstrom(properties: Properties) -> float | None:
    """None where EMAN2 has its placeholder of 1.0, or the axes differ by more than 1%."""
    try:
        sizes = [float(properties[name] or "nan") for name in _PIXEL_SIZES if name in properties]
    except ValueError:
        return None
    if not sizes or not all(math.isfinite(size) and size > 0 for size in sizes) or max(sizes) > 1.01 * min(sizes):
        return None
    mean = round(sum(sizes) / len(sizes), 5)
    return None if mean == 1.0 else mean
