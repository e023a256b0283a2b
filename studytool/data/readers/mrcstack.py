"""Stacks of volumes in one MRC file, as `N@file` of a STAR file or a line of an .lst file points into them.

MRC2014 marks them by a space group of 401 to 630 and the sections of one volume in `mz`; programs differ, so that the
shape decides where the marks are not there.
"""

from __future__ import annotations

import io
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from studytool.data.readers import mrc
from studytool.errors import DataError

_HEADER_BYTES = 1024
_LARGEST_CELL_ANGSTROM = 1e9


def count_volumes(path: Path) -> int:
    """How many volumes the file holds, from its header.

    Raises:
        DataError: it holds 2D images, or its header cannot be true.
    """
    return _read_layout(path).volumes


def read_volume_of_stack(path: Path, number: int) -> mrc.MrcVolume:
    """Read volume `number`, counted from 1, of a stack or, as number 1, the volume of a file that holds one.

    Raises:
        DataError: as for `count_volumes` and `read_mrc`, or there is no such volume.
    """
    layout = _read_layout(path)
    if not 1 <= number <= layout.volumes:
        raise DataError(f"{path}: volume {number} is asked for, the file holds {layout.volumes}")
    with path.open("rb") as file:
        file.seek(layout.data_offset + (number - 1) * layout.volume_bytes)
        content = file.read(layout.volume_bytes)
    return mrc.read_open_file(path, io.BytesIO(layout.header_of_one + content))


@dataclass(frozen=True)
class _Layout:
    volumes: int
    volume_bytes: int
    data_offset: int
    header_of_one: bytes  # the header that one of the volumes would have in a file of its own


def _read_layout(path: Path) -> _Layout:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            content = file.read(_HEADER_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if mrc.expander(content) is not None:
        raise DataError(f"{path}: a compressed stack of volumes; expand it first, so that one volume can be reached")
    if len(content) < _HEADER_BYTES:
        raise DataError(f"{path}: {len(content)} bytes are too few for an MRC header of {_HEADER_BYTES}")
    order, _ = mrc.byte_order(content)
    columns, rows, sections = struct.unpack(f"{order}3i", content[:12])
    sampled_sections = struct.unpack(f"{order}i", content[36:40])[0]
    cell_z = struct.unpack(f"{order}f", content[48:52])[0]
    space_group = struct.unpack(f"{order}i", content[88:92])[0]
    if min(columns, rows, sections) < 1:
        raise DataError(f"{path}: the header claims {sections} x {rows} x {columns} voxels; it is damaged")
    depth = _depth(path, (sections, rows, columns), sampled_sections, marked=401 <= space_group <= 630)
    one = bytearray(content)
    one[8:12] = one[36:40] = struct.pack(f"{order}i", depth)
    if 0 < cell_z < _LARGEST_CELL_ANGSTROM:  # what else stands there tells no voxel size either
        one[48:52] = struct.pack(f"{order}f", cell_z * depth / max(sampled_sections, 1))
    one[88:96] = struct.pack(f"{order}2i", 1, 0)  # a single volume, no extended header
    header = mrc.parse_header(path, bytes(one))
    data_offset = _HEADER_BYTES + max(struct.unpack(f"{order}i", content[92:96])[0], 0)
    volume_bytes = math.prod(header.shape_srx) * header.voxel_bytes
    volumes = sections // depth
    if data_offset + volumes * volume_bytes > size:
        raise DataError(
            f"{path}: the header claims {volumes} volumes of {depth} x {rows} x {columns} voxels, that is "
            f"{data_offset + volumes * volume_bytes} bytes; the file has {size}, so it is cut off or damaged"
        )
    return _Layout(volumes, volume_bytes, data_offset, bytes(one))


def _depth(path: Path, shape_srx: tuple[int, int, int], sampled_sections: int, *, marked: bool) -> int:
    """The sections of one volume: `mz` where it divides the stack, else as many as a cube has."""
    sections, rows, columns = shape_srx
    if 1 < sampled_sections < sections and sections % sampled_sections == 0:
        return sampled_sections
    cubes = rows == columns and sections % columns == 0 and columns > 1
    if cubes and (marked or sampled_sections == sections):
        return columns
    if sections > 1 and sampled_sections == sections:
        return sections
    raise DataError(
        f"{path}: {sections} sections of {rows} x {columns} with mz {sampled_sections} are 2D images, not volumes; a "
        "stack of volumes has the number of sections of one volume in mz"
    )
