"""Tomograms as OME-Zarr (OME-NGFF 0.4, Zarr format 2): the finest level, of which only the chunks under a box are read.

The metadata come from strangers and are held against what can be before zarr sees them: a codec may run code (pickle is
one of them), a shape or a chunk may claim more than any memory holds.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from studytool.data.readers.chunksize import expanded_bytes
from studytool.errors import DataError

MAX_JSON_BYTES = 64 * 2**20
_CODECS = ("blosc", "zstd", "zlib", "gzip", "lz4", "bz2", "lzma")
_MAX_SIDE = 2**16
_MAX_BYTES = 2**40
_MAX_CHUNK_BYTES = 2**30
_LARGE_CHUNK = 2**26
_MAX_STORED = 1.1  # as a part of the chunk's bytes: what cannot be compressed grows by less
_ANGSTROM = {"angstrom": 1.0, "nanometer": 10.0, "micrometer": 1e4}
_AXES = ["z", "y", "x"]


@dataclass(frozen=True)
class OmeZarr:
    """A volume in a folder; a part of it is read when it is asked for.

    `voxel_size_angstrom` is None where the metadata do not tell, or tell different ones for the axes.
    """

    folder: Path
    shape: tuple[int, int, int]
    chunks: tuple[int, int, int]
    chunk_bytes: int
    codec: str | None
    separator: str
    voxel_size_angstrom: float | None

    def __getitem__(self, part: tuple[slice, slice, slice]) -> Any:
        """A part inside the volume, with its own type.

        Raises:
            DataError: a chunk is missing, too large for what it should hold, or damaged.
        """
        first, *others = self._chunks_under(part)
        decoded = _large_chunk if self.chunk_bytes > _LARGE_CHUNK else _small_chunk
        starts = [side.start for side in part]
        values = np.empty([side.stop - side.start for side in part], decoded(self, first).dtype)
        for index in (first, *others):
            begins = [number * side for number, side in zip(index, self.chunks, strict=True)]
            chunk = decoded(self, index)
            common = [
                (max(side.start, begin), min(side.stop, begin + length))
                for side, begin, length in zip(part, begins, chunk.shape, strict=True)
            ]
            to = tuple(slice(low - start, high - start) for (low, high), start in zip(common, starts, strict=True))
            source = tuple(slice(low - begin, high - begin) for (low, high), begin in zip(common, begins, strict=True))
            values[to] = chunk[source]
        return values

    def _chunks_under(self, part: tuple[slice, slice, slice]) -> list[tuple[int, int, int]]:
        """The chunks of a part, all there: what is missing would be read as zeros."""
        z, y, x = (
            range(side.start // length, (side.stop - 1) // length + 1)
            for side, length in zip(part, self.chunks, strict=True)
        )
        indices = list(itertools.product(z, y, x))
        for index in indices:
            chunk = self.folder / self.separator.join(map(str, index))
            if not chunk.is_file():
                raise DataError(f"{chunk}: this chunk is missing; the tomogram is not whole, fetch it again")
            stored = chunk.stat().st_size
            if stored > _MAX_STORED * self.chunk_bytes + 1024:
                raise DataError(f"{chunk}: {stored} bytes for a chunk of {self.chunk_bytes}; it is damaged")
        return indices


def _decoded(volume: OmeZarr, index: tuple[int, int, int]) -> np.ndarray[Any, Any]:
    zarr = _zarr()
    _check_expanded(volume, index)
    z, y, x = (
        slice(number * length, min((number + 1) * length, side))
        for number, length, side in zip(index, volume.chunks, volume.shape, strict=True)
    )
    try:
        store = zarr.DirectoryStore(str(volume.folder), dimension_separator=volume.separator)
        chunk: np.ndarray[Any, Any] = zarr.Array(store, read_only=True)[z, y, x]
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, EOFError, zarr.errors.MetadataError) as error:
        name = volume.separator.join(map(str, index))
        raise DataError(f"{volume.folder / name}: this chunk cannot be read: {_line(error)}") from error
    return chunk


def _check_expanded(volume: OmeZarr, index: tuple[int, int, int]) -> None:
    """Refuse a chunk that would get larger than what the metadata say, before any memory is taken for it."""
    if volume.codec is None:
        return
    path = volume.folder / volume.separator.join(map(str, index))
    size = expanded_bytes(volume.codec, path.read_bytes(), volume.chunk_bytes)
    if size != volume.chunk_bytes:
        gets = "larger" if size is not None and size > volume.chunk_bytes else f"{size or 'an unknown number of'} bytes"
        raise DataError(
            f"{path}: this chunk cannot be read: it should hold {volume.chunk_bytes} bytes, and gets {gets}"
        )


# The boxes of a tomogram come near after near (see `boxes`), so that few chunks, 256 MiB at most or one, serve many.
_small_chunk = lru_cache(maxsize=4)(_decoded)
_large_chunk = lru_cache(maxsize=1)(_decoded)


def open_ome_zarr(path: Path) -> OmeZarr:
    """Check the metadata of a volume; no voxel is read.

    Raises:
        DataError: no OME-Zarr of format 2, axes other than z, y, x, or metadata that cannot be true or not be read.
    """
    _zarr()
    if (path / "zarr.json").exists():
        raise DataError(f"{path}: Zarr format 3, which is not read; convert it to format 2, or to MRC")
    folder, voxel_size = path, None
    if (path / ".zattrs").is_file():
        multiscales = read_json(path / ".zattrs").get("multiscales")
        if isinstance(multiscales, list) and multiscales and isinstance(multiscales[0], dict):
            name = _finest(path, multiscales[0])
            folder, voxel_size = path / name, _voxel_size(multiscales[0])
    if not (folder / ".zarray").is_file():
        raise DataError(f"{path}: no OME-Zarr volume: {folder / '.zarray'} is not there")
    layout = read_json(folder / ".zarray")
    shape = _triple(folder, layout, "shape")
    chunks = _triple(folder, layout, "chunks")
    dtype = _dtype(folder, layout)
    chunk_bytes = math.prod(chunks) * dtype.itemsize
    if max(shape) > _MAX_SIDE or math.prod(shape) * dtype.itemsize > _MAX_BYTES or chunk_bytes > _MAX_CHUNK_BYTES:
        raise DataError(
            f"{folder}: claims {' x '.join(map(str, shape))} voxels of {dtype} in chunks of "
            f"{' x '.join(map(str, chunks))}; that is no tomogram, or one to store in smaller chunks (1 GiB at most)"
        )
    codec = _codec(folder, layout)
    separator = layout.get("dimension_separator") or ("/" if (folder / "0").is_dir() else ".")
    if separator not in ("/", "."):
        raise DataError(f"{folder}: dimension_separator is {separator!r}; it may be '/' or '.'")
    return OmeZarr(folder, shape, chunks, chunk_bytes, codec, separator, voxel_size)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        DataError: it is too large, or no JSON, or something else.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise DataError(f"{path}: {size} bytes of JSON; {MAX_JSON_BYTES} are taken")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {_line(error)}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: a JSON object is expected, it holds a {type(value).__name__}")
    return value


def _zarr() -> Any:
    try:
        import zarr
    except ImportError as error:
        raise DataError("zarr volumes need a package more: pip install 'studytool[copick]'") from error
    return zarr


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _finest(path: Path, multiscale: dict[str, Any]) -> str:
    """The name of the first level, which OME-NGFF has the finest be."""
    axes = multiscale.get("axes", _AXES)
    names = [axis.get("name") if isinstance(axis, dict) else axis for axis in axes] if isinstance(axes, list) else axes
    if names != _AXES:
        raise DataError(f"{path}: the axes are {names}; a tomogram has z, y, x")
    datasets = multiscale.get("datasets")
    first = datasets[0] if isinstance(datasets, list) and datasets else None
    name = first.get("path") if isinstance(first, dict) else None
    parts = Path(name).parts if isinstance(name, str) else ()
    if not parts or ".." in parts or Path(*parts).is_absolute() or "\0" in str(name):
        raise DataError(f"{path}: the first level is at {name!r}; it has to be a folder inside")
    return str(name)


def _voxel_size(multiscale: dict[str, Any]) -> float | None:
    try:
        units = {axis.get("unit") for axis in multiscale["axes"]}
        scales = [
            transform["scale"]
            for transform in multiscale["datasets"][0]["coordinateTransformations"]
            if transform["type"] == "scale"
        ]
        sizes = [float(size) * _ANGSTROM[units.pop()] for size in scales[0]] if len(units) == len(scales) == 1 else []
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return None
    if len(sizes) != 3 or not all(math.isfinite(size) and size > 0 for size in sizes):
        return None
    return sum(sizes) / 3 if max(sizes) <= 1.01 * min(sizes) else None


def _triple(folder: Path, layout: dict[str, Any], key: str) -> tuple[int, int, int]:
    value = layout.get(key)
    if not isinstance(value, list) or len(value) != 3 or not all(type(side) is int and side > 0 for side in value):
        raise DataError(f"{folder}: {key} is {str(value)[:80]}; a tomogram has three whole numbers above 0")
    z, y, x = value
    return z, y, x


def _dtype(folder: Path, layout: dict[str, Any]) -> np.dtype[Any]:
    text = layout.get("dtype")
    try:
        dtype = np.dtype(text) if isinstance(text, str) else None
    except TypeError:
        dtype = None
    if layout.get("zarr_format") != 2 or dtype is None or dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise DataError(
            f"{folder}: zarr_format {layout.get('zarr_format')!r}, dtype {str(text)[:80]!r}; what is read is format 2 "
            "with integers or floating-point numbers of up to 8 bytes"
        )
    return dtype


def _codec(folder: Path, layout: dict[str, Any]) -> str | None:
    compressor = layout.get("compressor")
    name = compressor.get("id") if isinstance(compressor, dict) else compressor
    if layout.get("filters") or (name is not None and name not in _CODECS):
        raise DataError(
            f"{folder}: compressor {name!r}, filters {str(layout.get('filters'))[:80]}; what is read is without "
            f"filters and without compressor, or with {', '.join(_CODECS)}"
        )
    return name
