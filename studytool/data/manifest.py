"""A dataset's table of contents: `manifest.json` beside the shards, checked before anything else is believed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from studytool.data.particles import SPLITS
from studytool.errors import DataError
from studytool.files import write_json
from studytool.settings import Dtype

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
_MAX_MANIFEST_BYTES = 256 * 1024 * 1024
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.parquet")
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class ShardEntry:
    """One shard file: its name in the folder, how many volumes and bytes it has, and its SHA-256."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str
    rows: Annotated[int, Field(ge=1)]
    bytes: Annotated[int, Field(ge=1)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class Manifest:
    """What a dataset holds; `counts[class][split]` are numbers of volumes, with split "" for those without one.

    `classes` is sorted; a label is stored by name and becomes its index here. `fingerprint` is equal for two datasets
    exactly when all their shards are, byte for byte.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    format_version: Literal[1]
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    classes: tuple[str, ...]
    counts: dict[str, dict[str, Count]]
    tomograms: tuple[str, ...]
    shape_dhw: tuple[Count, Count, Count]
    dtype: Dtype
    voxel_size_angstrom: Annotated[float, Field(gt=0)]
    shards: tuple[ShardEntry, ...]
    provenance: dict[str, Any]

    @property
    def num_volumes(self) -> int:
        """Number of volumes in all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def volume_bytes(self) -> int:
        """Bytes of one stored volume."""
        depth, height, width = self.shape_dhw
        return depth * height * width * np.dtype(self.dtype).itemsize

    def split_counts(self) -> dict[str, int]:
        """Number of volumes in each split that has any."""
        sums = {split: sum(by_split.get(split, 0) for by_split in self.counts.values()) for split in (*SPLITS, "")}
        return {split: number for split, number in sums.items() if number}


_ADAPTER = TypeAdapter(Manifest)


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of the dataset in `folder`.

    Raises:
        DataError: there is none, it cannot be read, it is of another format version, or it contradicts itself.
    """
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; `studytool data simulate` or `studytool data import` makes a dataset"
        )
    if not path.is_file():
        raise DataError(f"{folder}: no {MANIFEST_NAME}, so this is not a finished studytool dataset; make it again")
    if path.stat().st_size > _MAX_MANIFEST_BYTES:
        raise DataError(f"{path}: {path.stat().st_size} bytes; a manifest has at most {_MAX_MANIFEST_BYTES}")
    try:
        manifest = _ADAPTER.validate_json(path.read_bytes())
    except ValidationError as error:
        raise DataError(f"{path}: {_first_problem(error)}") from error
    _check_consistency(path, manifest)
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest` into `folder`, whole or not at all."""
    write_json(folder / MANIFEST_NAME, asdict(manifest))


def fingerprint_of(shards: Sequence[ShardEntry]) -> str:
    """SHA-256 over the checksums of the shards in their order."""
    return hashlib.sha256("\n".join(shard.sha256 for shard in shards).encode()).hexdigest()


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    found = problem["input"]
    if where == "format_version":
        return (
            f"format_version is {found!r}, this studytool reads {FORMAT_VERSION}; "
            "install a newer studytool, or make the dataset again"
        )
    message = problem["msg"][:1].lower() + problem["msg"][1:]
    shown = "" if isinstance(found, Mapping | list) else f" (found {str(found)[:80]!r})"
    return f"{where}: {message}{shown}" if where else message


def _check_consistency(path: Path, manifest: Manifest) -> None:
    for shard in manifest.shards:
        if not _SHARD_NAME.fullmatch(shard.name):
            raise DataError(f"{path}: shard name {shard.name!r} is not a plain name that ends in .parquet")
    names = [shard.name for shard in manifest.shards]
    if not names or len(set(names)) != len(names):
        raise DataError(f"{path}: shards have to be listed, each once; found {len(names)}, {len(set(names))} different")
    if list(manifest.classes) != sorted(set(manifest.classes)) or not manifest.classes:
        raise DataError(f"{path}: classes have to be sorted and different, found {list(manifest.classes)[:20]}")
    if set(manifest.counts) != set(manifest.classes):
        raise DataError(f"{path}: counts are given for other classes than `classes` names")
    unknown = {split for by_split in manifest.counts.values() for split in by_split} - {*SPLITS, ""}
    if unknown:
        raise DataError(f"{path}: unknown split {min(unknown)!r} in counts; known: {', '.join(SPLITS)}")
    if min(manifest.shape_dhw) < 1:
        raise DataError(f"{path}: shape_dhw has to be positive, found {list(manifest.shape_dhw)}")
    total = sum(sum(by_split.values()) for by_split in manifest.counts.values())
    if total != manifest.num_volumes:
        raise DataError(f"{path}: counts add up to {total} volumes, the shards to {manifest.num_volumes}")
    if manifest.fingerprint != fingerprint_of(manifest.shards):
        raise DataError(f"{path}: the fingerprint does not belong to the shards it lists; the manifest was edited")
