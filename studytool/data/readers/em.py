"""EM files (TOM toolbox, PyTom, Dynamo): one volume in a file of its own, in a folder per class or as a single file.

Source of the layout: Nickell et al., J. Struct. Biol. 149 (2005) 227-234, and the head of its `tom_emread`.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import emfile
import numpy as np

from studytool.data.readers.source import NO_TOMOGRAM_NOTE, Entry, Listing, ReadOptions, ReadVolume
from studytool.errors import DataError

_HEADER_BYTES = 512
_LITTLE_ENDIAN_MACHINE = 6
_BIG_ENDIAN_MACHINES = {0: "OS-9", 3: "SGI", 4: "Sun", 5: "Mac"}
_VOXEL_BYTES = {1: 1, 2: 2, 4: 4, 5: 4, 9: 8}
_COMPLEX_BYTES = {8: 8, 10: 16}
_PIXEL_SIZE_OFFSET = 120  # the seventh of 40 integers: Å times 1000
_PLAUSIBLE_MILLIANGSTROM = range(100, 1_000_000)


def recognize(path: Path, options: ReadOptions) -> EmSource | None:
    """An EM file, a folder with a folder of EM files per class, or a folder of EM files where `options.label` is given.

    Raises:
        DataError: a file is a link that leads out of the folder (or of `options.root`).
    """
    if options.tomograms is not None or options.coordinates is not None:
        return None
    if path.is_file():
        files = [("", path)] if looks_like_em(path) else []
        kind, left_out = "EM file", 0
    elif path.is_dir():
        kind = "folder with a folder of EM files per class"
        everything = [(folder.name, file) for folder in _shown(path) if folder.is_dir() for file in _shown(folder)]
        files = [(label, file) for label, file in everything if looks_like_em(file)]
        left_out = len(everything) - len(files)
        if not files and options.label is not None:
            kind, left_out = "folder of EM files", 0
            files = [("", file) for file in _shown(path) if looks_like_em(file)]
    else:
        return None
    if not files:
        return None
    root = path if path.is_dir() else path.parent
    _refuse_links_out(options.root or root, [file for _, file in files])
    notes = [NO_TOMOGRAM_NOTE]
    if left_out:
        notes.append(f"{left_out} files in the class folders are no EM files and are left out")
    entries = [
        Entry(
            particle_id=file.relative_to(root).with_suffix("").as_posix(),
            label=label or options.label or "",
            tomogram="",
            where=file,
            origin=str(file),
        )
        for label, file in files
    ]
    return EmSource(kind, entries, tuple(notes), {"source": kind, "path": str(path)})


class EmSource(Listing):
    """A source of one EM file per particle; the path of each is its entry's `where`."""

    def read(self, entry: Entry) -> ReadVolume:
        """Read the volume of one entry.

        Raises:
            DataError: see `read_em`.
        """
        return read_em(entry.where)


def looks_like_em(path: Path) -> bool:
    """Whether a file is EM by its content, or by its name and not quite by its content, so that reading says why."""
    try:
        if not path.is_file():
            return False
        size = path.stat().st_size
        with path.open("rb") as file:
            content = file.read(_HEADER_BYTES)
    except OSError:
        return False
    if path.suffix.lower() == ".em":
        return True
    machine, kind = content[:1], content[3:4]
    if len(content) < _HEADER_BYTES or machine[0] not in (_LITTLE_ENDIAN_MACHINE, *_BIG_ENDIAN_MACHINES):
        return False
    voxel_bytes = (_VOXEL_BYTES | _COMPLEX_BYTES).get(kind[0])
    if voxel_bytes is None:
        return False
    shape_xyz: tuple[int, int, int] = struct.unpack(f"{_byte_order(machine[0])}3i", content[4:16])
    return min(shape_xyz) > 0 and size == _HEADER_BYTES + math.prod(shape_xyz) * voxel_bytes


def read_em(path: Path) -> ReadVolume:
    """Read the volume of an EM file; its voxel size is None where the header holds 0 or the placeholder 1.0.

    Raises:
        DataError: the file is missing or cut off, its header claims more than it holds, it holds no single volume of
            real numbers or was written by a big-endian machine.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_HEADER_BYTES)
        _check_header(path, content, path.stat().st_size)
        # a map, since a plain read of emfile takes all that follows the header for the volume
        _, data = emfile.read(path, mmap=True)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    with np.errstate(over="ignore"):  # a double too large for a float becomes infinite, which the import refuses
        volume = np.array(data, dtype=np.float32)
    milliangstrom = struct.unpack("<i", content[_PIXEL_SIZE_OFFSET : _PIXEL_SIZE_OFFSET + 4])[0]
    told = milliangstrom in _PLAUSIBLE_MILLIANGSTROM and milliangstrom != 1000
    return ReadVolume(volume, milliangstrom / 1000 if told else None)


def _check_header(path: Path, content: bytes, size: int) -> None:
    if len(content) < _HEADER_BYTES:
        raise DataError(f"{path}: {len(content)} bytes are too few for an EM header of {_HEADER_BYTES}")
    machine, kind = content[0], content[3]
    if machine in _BIG_ENDIAN_MACHINES:
        raise DataError(
            f"{path}: an EM file of a big-endian machine ({_BIG_ENDIAN_MACHINES[machine]}); convert it to MRC, or "
            "read and write it once with a program of today"
        )
    if machine != _LITTLE_ENDIAN_MACHINE:
        raise DataError(f"{path}: the machine byte is {machine}, it has to be {_LITTLE_ENDIAN_MACHINE}; no EM file?")
    if kind not in _VOXEL_BYTES:
        what = "complex numbers, as of a Fourier transform" if kind in _COMPLEX_BYTES else "not a type of EM files"
        raise DataError(f"{path}: data type {kind} cannot be used: {what}; {', '.join(map(str, _VOXEL_BYTES))} can")
    columns, rows, sections = struct.unpack("<3i", content[4:16])
    if min(columns, rows, sections) < 1:
        raise DataError(f"{path}: the header claims {sections} x {rows} x {columns} voxels; it is damaged")
    if sections == 1:
        raise DataError(f"{path}: a single image of {rows} x {columns}, not a volume")
    claimed = _HEADER_BYTES + columns * rows * sections * _VOXEL_BYTES[kind]
    if claimed > size:
        raise DataError(
            f"{path}: the header claims {sections} x {rows} x {columns} voxels, that is {claimed} bytes; the file has "
            f"{size}, so it is cut off or damaged"
        )


def _byte_order(machine: int) -> str:
    return "<" if machine == _LITTLE_ENDIAN_MACHINE else ">"


def _shown(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if not path.name.startswith((".", "__MACOSX")))


def _refuse_links_out(root: Path, files: Sequence[Path]) -> None:
    real_root = Path(os.path.realpath(root))
    for file in files:
        real = Path(os.path.realpath(file))
        if not real.is_relative_to(real_root) and file.is_relative_to(root):
            raise DataError(
                f"{file}: a link to {real}, outside {root}; nothing is read from there: name the folder that holds all "
                "files with --root"
            )
