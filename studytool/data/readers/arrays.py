"""Volumes in one array: `.npy` with its labels beside it, `.npz` with both, MedMNIST3D `.npz` with its splits.

Headers are read by numpy's own parser and held against the file before any memory is taken; nothing is unpickled.
A `.npy` is mapped. A member of an `.npz` is read as a stream, each process keeping its place, since an array that was
compressed cannot be reached in the middle and may be larger than the memory.
"""

from __future__ import annotations

import csv
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from studytool.data.particles import SPLITS
from studytool.data.readers.source import NO_TOMOGRAM_NOTE, Entry, Listing, ReadOptions, ReadVolume
from studytool.data.readers.tables import column_named, lines_of_text
from studytool.errors import DataError

INTEGER_LABELS_NOTE = (
    "the labels are integers and are kept as names ('0', '1', …); what each means is not the same in other sources"
)
_NPY_MAGIC = b"\x93NUMPY"
_ZIP_MAGIC = b"PK\x03\x04"
_MAX_EXPANSION = 1000  # of a compressed member; volumes worth reading do not shrink to less than a thousandth
_MOST_CHANNELS = 4
_MAX_LABEL_BYTES = 2**30
_VOLUME_NAMES = ("volumes", "images", "x", "data", "subtomograms")
_LABEL_NAMES = ("labels", "label", "y", "targets")
_GROUP_NAMES = ("tomograms", "tomogram", "groups")
_READ_ERRORS = (OSError, EOFError, ValueError, RuntimeError, NotImplementedError, zlib.error, zipfile.BadZipFile)


@dataclass(frozen=True)
class Stack:
    """An array of N volumes in a file; `member` is its name in an `.npz`, None in a `.npy`.

    The values begin `data_offset` bytes after the start of the file or member.
    """

    path: Path
    member: str | None
    shape: tuple[int, ...]
    dtype: str
    data_offset: int

    @property
    def shape_dhw(self) -> tuple[int, ...]:
        """The shape of one volume, without a channel."""
        return self.shape[-3:]

    def volume(self, number: int) -> np.ndarray[Any, Any]:
        """Volume `number`, in the type it is stored in.

        Raises:
            DataError: the file is damaged.
        """
        try:
            if self.member is None:
                mapped = np.load(self.path, mmap_mode="r", allow_pickle=False)
                return np.array(mapped[number].reshape(self.shape_dhw))
            width = math.prod(self.shape_dhw) * np.dtype(self.dtype).itemsize
            stream = _member(self.path, self.member, self.path.stat().st_mtime_ns)
            stream.seek(self.data_offset + number * width)
            content = stream.read(width)
            return np.frombuffer(content, dtype=self.dtype).reshape(self.shape_dhw)
        except _READ_ERRORS as error:
            raise DataError(f"{self.path}: volume {number} cannot be read, the file is damaged: {error}") from error


@dataclass(frozen=True)
class Arrays(Listing):
    """A source of one or more stacks; an entry's `where` is its stack's name and its number in it."""

    stacks: Mapping[str, Stack]

    def read(self, entry: Entry) -> ReadVolume:
        """Read the volume of one entry; arrays do not tell the voxel size.

        Raises:
            DataError: the file is damaged.
        """
        stack, number = entry.where
        return ReadVolume(self.stacks[stack].volume(number).astype(np.float32), None)


def recognize(path: Path, options: ReadOptions) -> Arrays | None:
    """A `.npy` or `.npz` file, known by its first bytes; a zip file that holds no arrays is none.

    Raises:
        DataError: the arrays have other names, shapes or types than volumes and labels have, or claims that the file
            does not bear out.
    """
    if not path.is_file():
        return None
    with path.open("rb") as file:
        magic = file.read(len(_NPY_MAGIC))
    if magic == _NPY_MAGIC:
        return _from_npy(path, options)
    if magic.startswith(_ZIP_MAGIC):
        return _from_npz(path, options)
    return None


def _from_npy(path: Path, options: ReadOptions) -> Arrays:
    stack = _npy_stack(path)
    labels, groups = _labels_beside(path, options, stack.shape[0])
    entries = _entries(path.stem, "", stack, labels, groups)
    return Arrays(".npy array", tuple(entries), _notes(labels, groups), {"path": str(path)}, {"": stack})


def _from_npz(path: Path, options: ReadOptions) -> Arrays | None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist() if not info.is_dir()}
            if not members or not all(info.filename.endswith(".npy") for info in members.values()):
                return None
            if "train_images" in members:
                return _medmnist(path, archive, members)
            return _named_arrays(path, archive, members, options)
    except _READ_ERRORS as error:
        raise DataError(f"{path}: cannot be read as .npz: {error}") from error


def _named_arrays(
    path: Path, archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], options: ReadOptions
) -> Arrays:
    lower = {name.lower(): name for name in members}

    def find(names: Sequence[str]) -> str | None:
        return next((lower[name] for name in names if name in lower), None)

    def chosen(asked: str | None, names: Sequence[str], kind: str) -> str | None:
        return find(names) if asked is None else column_named(path, asked, members, kind)

    volumes = find(_VOLUME_NAMES)
    label_name = chosen(options.label_column, _LABEL_NAMES, "array of labels")
    group_name = chosen(options.group_column, _GROUP_NAMES, "array of tomograms")
    if volumes is None:
        raise DataError(
            f"{path}: holds the arrays {', '.join(sorted(members)[:20])}; the volumes have to be called one of "
            f"{', '.join(_VOLUME_NAMES)}, the labels one of {', '.join(_LABEL_NAMES)}"
        )
    stack = _npz_stack(path, archive, members[volumes])
    count = stack.shape[0]
    if label_name is not None:
        labels = _names(path, label_name, _small_array(path, archive, members[label_name]), count)
    elif options.label is not None:
        labels = _Names((options.label,) * count)
    else:
        raise DataError(
            f"{path}: holds no labels; add an array called one of {', '.join(_LABEL_NAMES)}, or give one with --label"
        )
    groups = None
    if group_name is not None:
        groups = _names(path, group_name, _small_array(path, archive, members[group_name]), count).names
    entries = _entries(path.stem, "", stack, labels, groups)
    return Arrays(".npz arrays", tuple(entries), _notes(labels, groups), {"path": str(path)}, {"": stack})


def _medmnist(path: Path, archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo]) -> Arrays:
    entries: list[Entry] = []
    stacks: dict[str, Stack] = {}
    for split in SPLITS:
        images, label_name = f"{split}_images", f"{split}_labels"
        if (images in members) != (label_name in members):
            raise DataError(f"{path}: has only one of {images} and {label_name}; each needs the other")
        if images not in members:
            continue
        stacks[split] = _npz_stack(path, archive, members[images])
        labels = _names(path, label_name, _small_array(path, archive, members[label_name]), stacks[split].shape[0])
        entries += _entries(f"{path.stem}/{split}", split, stacks[split], labels, None)
    notes = (
        INTEGER_LABELS_NOTE,
        NO_TOMOGRAM_NOTE,
        "the splits are those of the file; it has no voxel size, so give a number that suits with --voxel-size",
    )
    return Arrays("MedMNIST3D .npz", tuple(entries), notes, {"path": str(path)}, stacks)


def _entries(name: str, split: str, stack: Stack, labels: _Names, groups: Sequence[str] | None) -> list[Entry]:
    member = "" if stack.member is None else f", {stack.member.removesuffix('.npy')}"
    return [
        Entry(
            particle_id=f"{name}/{number:06d}",
            label=labels.names[number],
            tomogram="" if groups is None else groups[number],
            where=(split, number),
            origin=f"{stack.path}{member}[{number}]",
            split=split,
        )
        for number in range(stack.shape[0])
    ]


def _notes(labels: _Names, groups: Sequence[str] | None) -> tuple[str, ...]:
    notes = [INTEGER_LABELS_NOTE] if labels.were_integers else []
    return (*notes, NO_TOMOGRAM_NOTE) if groups is None else tuple(notes)


# headers


def _npy_stack(path: Path) -> Stack:
    with path.open("rb") as file:
        shape, _, dtype = _header(path, file)
        offset = file.tell()
    needed = offset + math.prod(shape) * dtype.itemsize
    if needed > path.stat().st_size:
        raise DataError(
            f"{path}: the header claims {dtype} {list(shape)}, that is {needed} bytes; the file has "
            f"{path.stat().st_size}, so it is cut off or damaged"
        )
    return _stack(path, None, shape, dtype, offset)


def _npz_stack(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Stack:
    shape, fortran, dtype, offset = _member_header(path, archive, info)
    if fortran:
        raise DataError(
            f"{path}: {info.filename} is stored in Fortran order, in which one volume cannot be read without all "
            "others; save np.ascontiguousarray of it"
        )
    return _stack(path, info.filename, shape, dtype, offset)


def _stack(path: Path, member: str | None, shape: tuple[int, ...], dtype: np.dtype[Any], offset: int) -> Stack:
    what = f"{path}: " if member is None else f"{path}: {member} "
    if dtype.kind not in "fiub":
        raise DataError(f"{what}is of type {dtype}; volumes are real numbers")
    if len(shape) not in (4, 5) or (len(shape) == 5 and shape[1] != 1) or min(shape) < 1:
        raise DataError(f"{what}has the shape {list(shape)}; volumes are [N, D, H, W] or [N, 1, D, H, W]")
    if shape[-1] <= _MOST_CHANNELS < shape[-2]:
        raise DataError(f"{what}has the shape {list(shape)}: images with {shape[-1]} channels, not volumes")
    return Stack(path, member, shape, dtype.str, offset)


def _member_header(
    path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo
) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, order, type and offset of the values of a member, whose sizes agree with one another and the file."""
    if info.flag_bits & 1:
        raise DataError(f"{path}: {info.filename} is encrypted")
    if info.file_size > _MAX_EXPANSION * max(info.compress_size, 1) or info.compress_size > path.stat().st_size:
        raise DataError(
            f"{path}: {info.filename} claims {info.file_size} bytes in {info.compress_size} compressed ones; that "
            "cannot be an array of volumes or labels"
        )
    with archive.open(info) as stream:
        shape, fortran, dtype = _header(path, stream)
        offset = stream.tell()
    if offset + math.prod(shape) * dtype.itemsize != info.file_size:
        raise DataError(
            f"{path}: {info.filename} claims {dtype} {list(shape)}, but has {info.file_size} bytes; it is damaged"
        )
    return shape, fortran, dtype, offset


def _header(path: Path, stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        version = npy.read_magic(stream)
        if version == (1, 0):
            shape, fortran, dtype = npy.read_array_header_1_0(stream)
        elif version == (2, 0):
            shape, fortran, dtype = npy.read_array_header_2_0(stream)
        else:
            raise DataError(f"{path}: an array file of version {version}; save it again with a plain type")
    except ValueError as error:
        raise DataError(f"{path}: the header of the array cannot be read: {' '.join(str(error).split())}") from error
    if dtype.hasobject:
        raise DataError(
            f"{path}: an array of Python objects, which can run code when it is read; save plain numbers or text, for "
            "example np.array(labels, dtype=str)"
        )
    if any(side < 0 for side in shape):
        raise DataError(f"{path}: the header claims the shape {list(shape)}; it is damaged")
    return shape, fortran, dtype


@lru_cache(maxsize=4)
def _member(path: Path, member: str, mtime_ns: int) -> IO[bytes]:
    """A member opened for reading, kept open by each process so that volumes in order are read in one pass."""
    del mtime_ns  # a part of the key: a file that was written anew is opened anew
    return zipfile.ZipFile(path).open(member)


# labels and groups


@dataclass(frozen=True)
class _Names:
    names: tuple[str, ...]
    were_integers: bool = False


def _labels_beside(path: Path, options: ReadOptions, count: int) -> tuple[_Names, Sequence[str] | None]:
    stem = path.with_suffix("").name
    candidates = [path.with_name(name) for name in (f"{stem}_labels.npy", f"{stem}_labels.csv", f"{stem}.csv")]
    candidates += [path.with_name("labels.npy"), path.with_name("labels.csv")]
    beside = next((file for file in candidates if file.is_file() and file != path), None)
    if beside is None:
        if options.label is not None:
            return _Names((options.label,) * count), None
        raise DataError(
            f"{path}: no labels beside it; looked for {', '.join(file.name for file in candidates)}; add one of these, "
            "or give one label for all with --label"
        )
    if beside.suffix == ".csv":
        return _labels_of_csv(beside, options, count)
    stated = beside.stat().st_size
    with beside.open("rb") as file:
        shape, _, dtype = _header(beside, file)
        if math.prod(shape) * dtype.itemsize > stated:
            raise DataError(f"{beside}: the header claims {dtype} {list(shape)}, the file has {stated} bytes")
    return _names(beside, "", np.load(beside, allow_pickle=False), count), None


def _labels_of_csv(path: Path, options: ReadOptions, count: int) -> tuple[_Names, Sequence[str] | None]:
    try:
        rows = list(csv.reader((line for _, line in lines_of_text(path) if line), strict=True))
    except csv.Error as error:
        raise DataError(f"{path}: not a CSV that can be read: {error}") from error
    header = [name.strip() for name in rows[0]] if rows else []
    label = header.index(column_named(path, options.label_column or "label", header, "label column"))
    group = None
    if options.group_column is not None or "tomogram" in header:
        group = header.index(column_named(path, options.group_column or "tomogram", header, "group column"))
    if len(rows) - 1 != count:
        raise DataError(f"{path}: {len(rows) - 1} rows under the header, the array has {count} volumes")
    for number, row in enumerate(rows):
        if len(row) != len(header):
            raise DataError(f"{path}, row {number}: {len(row)} values, the header names {len(header)}")
    groups = None if group is None else [row[group].strip() for row in rows[1:]]
    return _Names(tuple(row[label].strip() for row in rows[1:])), groups


def _small_array(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray[Any, Any]:
    shape, fortran, dtype, offset = _member_header(path, archive, info)
    if info.file_size > _MAX_LABEL_BYTES:
        raise DataError(f"{path}: {info.filename} has {info.file_size} bytes, too many for labels")
    with archive.open(info) as stream:
        content = stream.read()[offset:]
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")


def _names(path: Path, array_name: str, values: np.ndarray[Any, Any], count: int) -> _Names:
    """Labels or groups as text: text as it is, integers by their digits."""
    what = f"{path}: {array_name or 'labels'}"
    flat = values.reshape(-1) if values.ndim and values.size == len(values) else values
    if flat.shape != (count,):
        raise DataError(f"{what} has the shape {list(values.shape)}; for {count} volumes it has to be [{count}]")
    if flat.dtype.kind == "f" and np.array_equal(flat, np.trunc(flat)) and np.isfinite(flat).all():
        flat = flat.astype(np.int64)
    if flat.dtype.kind == "S":
        flat = np.char.decode(flat, "utf-8")
    if flat.dtype.kind not in "iubU":
        raise DataError(f"{what} is of type {flat.dtype}; labels are text or integers")
    return _Names(tuple(str(name) for name in flat.tolist()), were_integers=flat.dtype.kind in "iu")
