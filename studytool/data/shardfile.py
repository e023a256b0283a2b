"""One shard: the Parquet columns, how a file is written, and how one is checked and opened.

The layout lets any volume be reached by its offset, while every Parquet reader can open the file: a required
fixed-size binary column, plain, uncompressed, one page per row group, page checksums written.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import mmap
import re
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from studytool.data.manifest import FORMAT_VERSION, Manifest, ShardEntry
from studytool.data.pageheader import PageHeader, read_page_header
from studytool.data.particles import SPLITS, Particle
from studytool.errors import DataError
from studytool.files import whole_file
from studytool.settings import Compression

TEXT_COLUMNS = ("label", "tomogram", "split", "particle_id")
NUMBER_COLUMNS = ("snr", "position_z", "position_y", "position_x")
ROWS_PER_GROUP = 256
_DIGEST_BYTES = 1024 * 1024
_MAX_GROUP_BYTES = 2 * 1024 * 1024  # pyarrow's buffers for a larger group are returned to the system after each one
_MAX_READ_GROUP_BYTES = 1024 * 1024 * 1024
_MAX_HEADER_BYTES = 16 * 1024 * 1024  # may hold the smallest and the largest value
_MAX_PAGE_BYTES = 2**31 - 1
_MAX_FOOTER_BYTES = 64 * 1024 * 1024
_MAX_EXPANSION = 1000  # a compressed file that claims to hold more than this times its length is refused
_METADATA = "studytool."
_BASE64_RUN = re.compile(rb"[A-Za-z0-9+/]{24,}")

READ_ERRORS = (pa.ArrowException, OSError, ValueError, OverflowError)


@dataclass(frozen=True)
class Columns:
    """What a shard says of its volumes besides the volumes; arrays of length rows, numbers NaN where unknown."""

    label: np.ndarray[Any, Any]
    tomogram: np.ndarray[Any, Any]
    split: np.ndarray[Any, Any]
    particle_id: np.ndarray[Any, Any]
    snr: np.ndarray[Any, Any]
    position_zyx: np.ndarray[Any, Any]


@dataclass(frozen=True)
class ShardFile:
    """An opened and checked shard.

    `content` is the whole file, mapped. `starts[i]` is where volume i begins in it, or -1 in a row group of another
    layout, which has to be decoded; `groups` gives each row group's first row, and the number of rows last.
    """

    path: Path
    columns: Columns
    content: np.ndarray[Any, np.dtype[np.uint8]]
    memory: mmap.mmap
    starts: np.ndarray[Any, np.dtype[np.int64]]
    groups: np.ndarray[Any, np.dtype[np.int64]]

    @property
    def rows(self) -> int:
        """Number of volumes."""
        return len(self.starts)

    def decode_group(self, group: int, width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Read one row group's volumes through pyarrow: uint8 [rows, width].

        Raises:
            DataError: the row group is damaged, or a value is missing or of another length.
        """
        try:
            with pq.ParquetFile(self.path, memory_map=True) as parquet:
                values = parquet.read_row_group(group, columns=["volume"]).column("volume").combine_chunks()
        except READ_ERRORS as error:
            raise DataError(f"{self.path}: row group {group} cannot be read: {_one_line(error)}") from error
        if isinstance(values, pa.ChunkedArray):
            values = pa.concat_arrays(values.chunks)
        lengths = {width} if pa.types.is_fixed_size_binary(values.type) else set(_lengths(values))
        if values.null_count or lengths != {width}:
            raise DataError(f"{self.path}: row group {group} has volumes that are missing or not of {width} bytes")
        first = self.groups[group]
        if len(values) != self.groups[group + 1] - first:
            raise DataError(f"{self.path}: row group {group} has another number of volumes than the footer says")
        fixed = values.cast(pa.binary(width))
        data = np.frombuffer(fixed.buffers()[1], dtype=np.uint8)
        start = fixed.offset * width
        return data[start : start + len(fixed) * width].reshape(len(fixed), width)


@dataclass(frozen=True)
class Group:
    """Particles that share a row group: their own volumes are not looked at, `stored` [n, D, H, W] has them rounded."""

    particles: Sequence[Particle]
    stored: np.ndarray[Any, Any]


def write_shard(path: Path, groups: Iterable[Group], *, compression: Compression = "none") -> ShardEntry:
    """Write groups of particles, one row group each, as the shard `path`, whole or not at all; returns its entry.

    All volumes have to be of one shape, dtype and voxel size. A group's memory is not used any more when the next one
    is asked for. A compressed shard is for keeping: its volumes have no offsets.
    """
    with whole_file(path) as temporary:
        writer = _GroupWriter(temporary, compression)
        with closing(writer):
            for group in groups:
                writer.write(group)
        return ShardEntry(path.name, writer.rows, temporary.stat().st_size, writer.digest.hexdigest())


def rows_per_group(volume_bytes: int) -> int:
    """How many volumes share a row group."""
    return max(1, min(ROWS_PER_GROUP, _MAX_GROUP_BYTES // volume_bytes))


def open_shard(path: Path, rows: int, manifest: Manifest) -> ShardFile:
    """Open the shard `path`, which has to have `rows` volumes of the shape and dtype that `manifest` states.

    Every claim of the file is held against the file's length and the manifest before it is relied on.

    Raises:
        DataError: the file is missing, damaged, not Parquet, of another format version or not what the manifest says.
    """
    _check_footer(path)
    try:
        parquet = pq.ParquetFile(path, memory_map=True)
        metadata, schema = parquet.metadata, parquet.schema_arrow
    except READ_ERRORS as error:
        raise DataError(f"{path}: not a Parquet file that can be read: {_one_line(error)}") from error
    with parquet:
        _check_schema(path, schema, manifest)
        width = manifest.volume_bytes
        _check_sizes(path, metadata, rows, width)
        with path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        starts, groups = _addresses(metadata, memory, width)
        if (starts < 0).any():
            _check_decodable(path, metadata, schema, width)
        columns = _read_columns(path, parquet)
    return ShardFile(path, columns, np.frombuffer(memory, dtype=np.uint8), memory, starts, groups)


_WRITE_OPTIONS: dict[str, Any] = {
    "use_dictionary": ["label", "tomogram", "split"],
    "write_statistics": list(TEXT_COLUMNS + NUMBER_COLUMNS),
    "write_page_checksum": True,
    "data_page_size": _MAX_PAGE_BYTES,
    "max_rows_per_page": _MAX_PAGE_BYTES,
    "store_schema": False,  # no Arrow schema beside Parquet's own: the columns need none
}


class _GroupWriter:
    """Writes row groups, and digests the file as it grows: what is written of a Parquet file never changes."""

    def __init__(self, path: Path, compression: Compression) -> None:
        self.path = path
        self.options = {**_WRITE_OPTIONS, "compression": compression}
        self.rows = 0
        self.digest = hashlib.sha256()
        self._writer: Any = None
        self._written = path.open("rb", buffering=0)
        self._part = memoryview(bytearray(_DIGEST_BYTES))

    def write(self, group: Group) -> None:
        stored = group.stored
        if self._writer is None:
            self._writer = pq.ParquetWriter(self.path, _schema(stored[0].nbytes), **self.options)
            stated = _stated(stored.shape[1:], stored.dtype.name, group.particles[0].voxel_size_angstrom)
            self._writer.add_key_value_metadata(stated)
        self._writer.write_table(_table(group, self._writer.schema), row_group_size=len(stored))
        self.rows += len(stored)
        self._digest_written()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._digest_written()
        self._written.close()

    def _digest_written(self) -> None:
        while count := self._written.readinto(self._part):
            self.digest.update(self._part[:count])


def _schema(width: int) -> Any:
    return pa.schema(
        [
            pa.field("volume", pa.binary(width), nullable=False),
            *(pa.field(name, pa.string(), nullable=False) for name in TEXT_COLUMNS),
            *(pa.field(name, pa.float64()) for name in NUMBER_COLUMNS),
        ]
    )


def _stated(shape_dhw: Sequence[int], dtype: str, voxel_size_angstrom: float) -> dict[str, str]:
    """The metadata of a shard; a reader without the manifest can make arrays of the values from it."""
    return {
        f"{_METADATA}format_version": str(FORMAT_VERSION),
        f"{_METADATA}shape_dhw": ",".join(map(str, shape_dhw)),
        f"{_METADATA}dtype": dtype,
        f"{_METADATA}voxel_size_angstrom": repr(float(voxel_size_angstrom)),
    }


def _table(group: Group, schema: Any) -> Any:
    particles = group.particles
    volumes = pa.Array.from_buffers(schema.field("volume").type, len(particles), [None, pa.py_buffer(group.stored)])
    texts = [pa.array([getattr(particle, name) for particle in particles], pa.string()) for name in TEXT_COLUMNS]
    positions = [particle.position_zyx or (None, None, None) for particle in particles]
    numbers = [pa.array([particle.snr for particle in particles], pa.float64())]
    numbers += [pa.array([position[axis] for position in positions], pa.float64()) for axis in range(3)]
    return pa.Table.from_arrays([volumes, *texts, *numbers], schema=schema)


def _check_footer(path: Path) -> None:
    """Check the file's ends; refuse extension types before pyarrow, which would run their code, reads the schema."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(4)
            file.seek(max(0, size - 8))
            tail = file.read(8)
            footer_bytes = int.from_bytes(tail[:4], "little")
            if size < 12 or head != b"PAR1" or tail[4:] != b"PAR1":
                raise DataError(
                    f"{path}: not a whole Parquet file ({size} bytes); it may have been cut off, fetch it again"
                )
            if footer_bytes > min(size - 12, _MAX_FOOTER_BYTES):
                raise DataError(
                    f"{path}: the footer says it has {footer_bytes} bytes, in a file of {size}; it is damaged"
                )
            file.seek(size - 8 - footer_bytes)
            footer = file.read(footer_bytes)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; is the dataset complete?") from error
    if b"ARROW:schema" in footer and any(b"ARROW:extension" in text for text in _decoded(footer)):
        raise DataError(f"{path}: has a column of an Arrow extension type, which could run code; store plain columns")


def _decoded(footer: bytes) -> Iterable[bytes]:
    for run in _BASE64_RUN.findall(footer):
        for skipped in range(4):  # a run may begin with bytes that are not of the text, so that its phase is not known
            text = run[skipped : len(run) - (len(run) - skipped) % 4]
            try:
                yield base64.b64decode(text, validate=True)
            except binascii.Error:
                continue


def _check_schema(path: Path, schema: Any, manifest: Manifest) -> None:
    found = {
        key.decode("utf-8", "replace"): text.decode("utf-8", "replace") for key, text in (schema.metadata or {}).items()
    }
    for key, value in _stated(manifest.shape_dhw, manifest.dtype, manifest.voxel_size_angstrom).items():
        if found.get(key) != value:
            raise DataError(f"{path}: {key} is {found.get(key)!r}, the manifest and this studytool say {value!r}")
    for name in ("volume", *TEXT_COLUMNS, *NUMBER_COLUMNS):
        if schema.names.count(name) != 1:
            raise DataError(f"{path}: has {schema.names.count(name)} columns {name!r}, a shard has one")
        kind = schema.field(name).type
        if isinstance(kind, pa.BaseExtensionType):
            raise DataError(f"{path}: column {name!r} is of extension type {kind}; store plain columns")
        if not _allowed(name, kind):
            raise DataError(f"{path}: column {name!r} is of type {kind}, which a shard's cannot be")


def _allowed(name: str, kind: Any) -> bool:
    if name == "volume":
        return bool(pa.types.is_fixed_size_binary(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
    if name in TEXT_COLUMNS:
        value = kind.value_type if pa.types.is_dictionary(kind) else kind
        return bool(pa.types.is_string(value) or pa.types.is_large_string(value))
    return bool(pa.types.is_floating(kind))


def _check_sizes(path: Path, metadata: Any, rows: int, width: int) -> None:
    size = path.stat().st_size
    in_groups = sum(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
    if metadata.num_rows != rows or in_groups != rows:
        raise DataError(
            f"{path}: has {metadata.num_rows} rows ({in_groups} in its row groups), the manifest says {rows}"
        )
    if rows * width > _MAX_EXPANSION * size:
        raise DataError(f"{path}: claims {rows} volumes of {width} bytes, in a file of {size}; that cannot be")
    for group in range(metadata.num_row_groups):
        part = metadata.row_group(group)
        if part.num_rows < 0 or part.num_rows * width > max(_MAX_READ_GROUP_BYTES, width):
            raise DataError(
                f"{path}: row group {group} claims {part.num_rows} volumes of {width} bytes; write smaller groups"
            )
        for index in range(part.num_columns):
            column = part.column(index)
            limit = _MAX_EXPANSION * size
            if column.num_values != part.num_rows or not 0 <= column.total_uncompressed_size <= limit:
                raise DataError(
                    f"{path}: row group {group}, column {column.path_in_schema!r}: sizes contradict the file's"
                )


def _addresses(metadata: Any, memory: mmap.mmap, width: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Where each volume starts (-1: to be decoded), and the first row of each row group, with the row count last."""
    counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    groups = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
    starts = np.full(int(groups[-1]), -1, dtype=np.int64)
    index = metadata.schema.to_arrow_schema().names.index("volume")
    required = metadata.schema.column(index).max_definition_level == 0
    for group, rows in enumerate(counts):
        column = metadata.row_group(group).column(index)
        plain = column.compression == "UNCOMPRESSED" and column.physical_type == "FIXED_LEN_BYTE_ARRAY"
        if not (required and plain and not column.has_dictionary_page):
            continue
        # the footer leaves so many bytes for one header before the values: the header itself has to agree
        at, header_bytes = column.data_page_offset, column.total_compressed_size - rows * width
        start = at + header_bytes
        if not (at > 0 and 0 < header_bytes <= _MAX_HEADER_BYTES and start + rows * width <= len(memory)):
            continue
        if read_page_header(memory[at:start]) != PageHeader(header_bytes, rows * width, rows):
            continue
        starts[groups[group] : groups[group + 1]] = start + width * np.arange(rows, dtype=np.int64)
    return starts, groups


def _check_decodable(path: Path, metadata: Any, schema: Any, width: int) -> None:
    kind = schema.field("volume").type
    if pa.types.is_fixed_size_binary(kind) and kind.byte_width != width:
        raise DataError(f"{path}: volumes are of {kind.byte_width} bytes, shape and dtype of the manifest need {width}")
    index = schema.names.index("volume")
    for group in range(metadata.num_row_groups):
        part = metadata.row_group(group)
        column = part.column(index)
        if column.compression == "UNCOMPRESSED" and part.num_rows * width > path.stat().st_size:
            raise DataError(
                f"{path}: row group {group} claims {part.num_rows} volumes of {width} bytes, more than the file"
            )


def _read_columns(path: Path, parquet: Any) -> Columns:
    try:
        table = parquet.read(columns=[*TEXT_COLUMNS, *NUMBER_COLUMNS], use_threads=False)
        table.validate(full=True)
        texts = {name: _texts(path, name, table.column(name)) for name in TEXT_COLUMNS}
        # through lists, as to_numpy of a column with gaps would import pandas; None becomes NaN
        numbers = [np.array(table.column(name).to_pylist(), dtype=np.float64) for name in NUMBER_COLUMNS]
    except READ_ERRORS as error:
        raise DataError(f"{path}: its columns cannot be read: {_one_line(error)}") from error
    if table.num_rows != parquet.metadata.num_rows:
        raise DataError(f"{path}: its columns have {table.num_rows} rows, the footer says {parquet.metadata.num_rows}")
    unknown = sorted({*texts["split"].tolist()} - {*SPLITS, ""})
    if unknown:
        row = int(np.flatnonzero(texts["split"] == unknown[0])[0])
        raise DataError(f"{path}: row {row} has the unknown split {unknown[0]!r}; known: {', '.join(SPLITS)}")
    return Columns(**texts, snr=numbers[0], position_zyx=np.stack(numbers[1:], axis=1))


def _texts(path: Path, name: str, column: Any) -> np.ndarray[Any, Any]:
    if column.null_count:
        raise DataError(f"{path}: column {name!r} has {column.null_count} empty values; every row needs one")
    return np.array(column.cast(pa.string()).to_pylist(), dtype=np.str_)


def _lengths(values: Any) -> Iterable[int]:
    import pyarrow.compute as pc

    return pc.unique(pc.binary_length(values)).to_pylist()  # type: ignore[no-any-return]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
