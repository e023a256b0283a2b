"""MRC2014 files -> volumes (z, y, x) in float32, with every claim of the header held against the file first.

Source of the layout: Cheng et al., J. Struct. Biol. 192 (2015) 146-150, and https://www.ccpem.ac.uk/mrc_format/mrc2014.php.
"""

from __future__ import annotations

import bz2
import gzip
import math
import stat
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from studytool.data.readers.source import require_finite
from studytool.errors import DataError

_HEADER_BYTES = 1024
_MAX_EXPANSION = 1000  # a volume worth reading does not shrink to less than a thousandth
_TYPES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}
_REFUSED_MODES = {
    3: "complex integers",
    4: "complex numbers, as of a Fourier transform; convert it to a real map",
    101: "packed 4-bit integers; convert it with `newstack -mode 2` of IMOD or the like",
}
_BYTE_ORDERS = {b"DD": "<", b"DA": "<", b"\x11\x11": ">"}


@dataclass(frozen=True)
class MrcVolume:
    """A volume in the order z, y, x.

    `voxel_size_angstrom` is None where the header does not tell: no cell, the placeholder 1.0, or axes that differ by
    more than 1% (then `voxel_size_zyx_angstrom` has all three).
    """

    volume_DHW: np.ndarray[Any, np.dtype[np.float32]]
    voxel_size_angstrom: float | None
    voxel_size_zyx_angstrom: tuple[float, float, float] | None


def read_mrc(path: Path) -> MrcVolume:
    """Read the volume in an MRC, MAP or REC file, plain or compressed with gzip or bzip2; the file is never written.

    Header oddities that do not hinder reading are warned of, with the file's name.

    Raises:
        DataError: the file is missing or cut off, its header claims more than the file holds, it holds no single
            volume of real numbers, or some voxels are NaN or infinite.
    """
    with _opened(path) as (file, compressed, size):
        head = file.read(_HEADER_BYTES)
        header = _compressed_header(path, head, size) if compressed else parse_header(path, head)
        if not compressed:
            _check_length(path, header, size)
            if size > header.file_bytes:
                warnings.warn(f"{path}: {size - header.file_bytes} bytes after the volume are ignored", stacklevel=2)
        return _read_voxels(path, file, header)


@dataclass(frozen=True)
class MrcHeader:
    """What a header says of its file: sections, rows and columns, and which of x (1), y (2), z (3) each of them is.

    `compressed` and `oddities` (what does not hinder reading) are for the user to be told.
    """

    shape_srx: tuple[int, int, int]
    axes_srx: tuple[int, int, int]
    dtype: str
    extended_bytes: int
    voxel_size_zyx_angstrom: tuple[float, float, float] | None
    oddities: tuple[str, ...]
    compressed: bool = False

    @property
    def voxel_bytes(self) -> int:
        """Bytes of one voxel."""
        return np.dtype(self.dtype).itemsize

    @property
    def data_offset(self) -> int:
        """Where the voxels begin."""
        return _HEADER_BYTES + self.extended_bytes

    @property
    def file_bytes(self) -> int:
        """The length that the file has to have."""
        return self.data_offset + math.prod(self.shape_srx) * self.voxel_bytes

    @property
    def order_zyx(self) -> tuple[int, int, int]:
        """Which of sections (0), rows (1), columns (2) run along z, y and x."""
        z, y, x = (self.axes_srx.index(axis) for axis in (3, 2, 1))
        return z, y, x

    @property
    def shape_dhw(self) -> tuple[int, int, int]:
        """The shape in the order z, y, x."""
        depth, height, width = (self.shape_srx[axis] for axis in self.order_zyx)
        return depth, height, width

    @property
    def voxel_size_angstrom(self) -> float | None:
        """As of `MrcVolume`."""
        return _one_size(self.voxel_size_zyx_angstrom)


def read_header(path: Path) -> MrcHeader:
    """Read and check the header alone; of a compressed file, how long it gets is only known once it is read whole.

    Raises:
        DataError: as for `read_mrc`, but for the voxels.
    """
    with _opened(path) as (file, compressed, size):
        head = file.read(_HEADER_BYTES)
    if compressed:
        return _compressed_header(path, head, size)
    header = parse_header(path, head)
    _check_length(path, header, size)
    return header


def map_mrc(path: Path) -> np.ndarray[Any, Any]:
    """The volume [z, y, x] of a plain file as a read-only memory map: no voxel is read before it is asked for.

    The type is that of the file. Whether values are finite is for the caller to look at.

    Raises:
        DataError: as for `read_header`, or the file is compressed.
    """
    header = read_header(path)
    if header.compressed:
        raise DataError(f"{path}: a compressed file, of which no part can be read alone; expand it")
    try:
        stored = np.memmap(path, header.dtype, mode="r", offset=header.data_offset, shape=header.shape_srx)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    return stored.transpose(header.order_zyx)


def read_open_file(path: Path, file: BinaryIO) -> MrcVolume:
    """Read the volume of an open file whose length has been checked; `path` is for messages.

    Raises:
        DataError: see `read_mrc`.
    """
    return _read_voxels(path, file, parse_header(path, file.read(_HEADER_BYTES)))


def _read_voxels(path: Path, file: BinaryIO, header: MrcHeader) -> MrcVolume:
    """What follows the header of an open file that has been read up to there; no more is read than the header says."""
    for oddity in header.oddities:
        warnings.warn(f"{path}: {oddity}", stacklevel=4)
    file.read(header.extended_bytes)
    stored = np.empty(header.shape_srx, header.dtype)
    voxels = stored.reshape(-1).view(np.uint8).data
    done = 0
    while count := file.readinto(voxels[done:]):  # type: ignore[attr-defined]
        done += count
    if done < stored.nbytes:
        _check_length(path, header, header.data_offset + done)
    volume = np.ascontiguousarray(stored.transpose(header.order_zyx), dtype=np.float32)
    if not math.isfinite(float(volume.max()) - float(volume.min())):
        require_finite(str(path), volume)
    return MrcVolume(volume, header.voxel_size_angstrom, header.voxel_size_zyx_angstrom)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, bool, int]]:
    """The content of a file, expanded where it is compressed, whether it is, and the file's own size.

    Errors of reading become DataError.
    """
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):  # asked before, as opening a pipe waits for its writer
            raise DataError(f"{path}: no regular file; an MRC file is expected")
        with path.open("rb") as file:
            expand = expander(file.read(3))
            file.seek(0)
            if expand is None:
                yield file, False, state.st_size
            else:
                with expand(file) as expanded:
                    yield cast(BinaryIO, expanded), True, state.st_size
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def expander(head: bytes) -> Callable[[BinaryIO], Any] | None:
    """What opens the content of a compressed file that begins with `head`; None where it is not compressed."""
    if head[:2] == b"\x1f\x8b":
        return lambda file: gzip.GzipFile(fileobj=file)
    return bz2.BZ2File if head[:3] == b"BZh" else None


def _compressed_header(path: Path, head: bytes, compressed_bytes: int) -> MrcHeader:
    header = parse_header(path, head)
    if header.file_bytes > _MAX_EXPANSION * compressed_bytes + _HEADER_BYTES:
        raise DataError(
            f"{path}: {compressed_bytes} compressed bytes claim to be {header.file_bytes}; that cannot be a volume"
        )
    return replace(header, compressed=True)


def _check_length(path: Path, header: MrcHeader, length: int) -> None:
    if header.file_bytes > length:
        raise DataError(
            f"{path}: the header claims {' x '.join(map(str, header.shape_srx))} voxels, that is {header.file_bytes} "
            f"bytes; the file has {length}, so it is cut off or damaged"
        )


def parse_header(path: Path, content: bytes) -> MrcHeader:
    """Check the 1024 bytes of a header; `path` is for messages.

    Raises:
        DataError: they are too few, or claim what cannot be or cannot be read.
    """
    if len(content) < _HEADER_BYTES:
        raise DataError(f"{path}: {len(content)} bytes are too few for an MRC header of {_HEADER_BYTES}")
    oddities = []
    if content[208:211] != b"MAP":
        oddities.append('the header lacks the id "MAP "; read as MRC all the same')
    order, guessed = byte_order(content)
    if guessed:
        oddities.append(f"unknown machine stamp {content[212:214].hex(' ')}; the byte order was guessed from the mode")
    columns, rows, sections, mode = struct.unpack(f"{order}4i", content[:16])
    if mode not in _TYPES:
        what = _REFUSED_MODES.get(mode, "not an MRC mode; is this an MRC file?")
        raise DataError(f"{path}: mode {mode} cannot be used: {what}; modes 0, 1, 2, 6 and 12 can")
    if min(columns, rows, sections) < 1:
        raise DataError(f"{path}: the header claims {sections} x {rows} x {columns} voxels; it is damaged")
    if sections == 1:
        raise DataError(f"{path}: a single image of {rows} x {columns}, not a volume")
    samples_xyz = struct.unpack(f"{order}3i", content[28:40])
    cell = struct.unpack(f"{order}6f", content[40:64])
    space_group, extended_bytes = struct.unpack(f"{order}2i", content[88:96])
    if extended_bytes < 0:
        raise DataError(f"{path}: the header claims an extended header of {extended_bytes} bytes; it is damaged")
    if 401 <= space_group <= 630:
        raise DataError(f"{path}: a stack of volumes (space group {space_group}); split it into one file each")
    if any(angle > 0 and abs(angle - 90) > 0.1 for angle in cell[3:]):
        oddities.append(
            f"cell angles {[round(angle, 2) for angle in cell[3:]]}; the voxels are used as if they were upright"
        )
    return MrcHeader(
        shape_srx=(sections, rows, columns),
        axes_srx=_axes(path, struct.unpack(f"{order}3i", content[64:76])),
        dtype=order + _TYPES[mode],
        extended_bytes=extended_bytes,
        voxel_size_zyx_angstrom=_voxel_size(samples_xyz, cell[:3]),
        oddities=tuple(oddities),
    )


def byte_order(content: bytes) -> tuple[str, bool]:
    """ "<" or ">" for the bytes of a header, and whether it had to be guessed from the mode."""
    order = _BYTE_ORDERS.get(content[212:214])
    if order is not None:
        return order, False
    mode: int = struct.unpack("<i", content[12:16])[0]
    return "<" if mode in _TYPES or mode in _REFUSED_MODES else ">", True


def _axes(path: Path, columns_rows_sections: tuple[int, ...]) -> tuple[int, int, int]:
    if not any(columns_rows_sections):
        return 3, 2, 1  # left empty by old programs
    if sorted(columns_rows_sections) != [1, 2, 3]:
        raise DataError(f"{path}: mapc, mapr, maps are {columns_rows_sections}, they have to be 1, 2, 3 in some order")
    column, row, section = columns_rows_sections
    return section, row, column


def _voxel_size(samples_xyz: tuple[int, ...], cell_xyz: tuple[float, ...]) -> tuple[float, float, float] | None:
    if min(samples_xyz) < 1:
        return None
    x, y, z = (round(length / samples, 5) for length, samples in zip(cell_xyz, samples_xyz, strict=True))
    if not all(math.isfinite(size) and size > 0 for size in (x, y, z)):
        return None
    return z, y, x


def _one_size(sizes_zyx: tuple[float, float, float] | None) -> float | None:
    if sizes_zyx is None or max(sizes_zyx) > 1.01 * min(sizes_zyx):
        return None
    mean = round(sum(sizes_zyx) / 3, 5)
    return None if mean == 1.0 else mean
