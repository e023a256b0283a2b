"""Boxes cut out of tomograms around positions: which of them fit, and the source that reads them.

Positions count voxels from 0, with the whole numbers at the centres of voxels. A particle comes to stand in the voxel
box // 2 of its box, which RELION, EMAN2 and Dynamo take for the middle; its position is rounded to the nearest voxel
and nothing is interpolated, so that a box holds the very values of the tomogram.

The rule at the border: a box may reach over each face of the tomogram by a third of its side, and what is missing is
filled with the mean of what is there. Boxes that reach further are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from studytool.data.readers.mrc import map_mrc, read_header, read_mrc
from studytool.data.readers.source import Entry, Listing, ReadOptions, ReadVolume, Volume, named
from studytool.errors import DataError

_SIDES = (2, 1024)
_IDS_NAMED = 5
_CELL = 128  # voxels; tomograms in chunks have them about that large or larger
_CONTRAST_NOTE = (
    "raw tomograms show proteins dark; --invert makes them bright, as subtomograms of other sources mostly are"
)


class Sliceable(Protocol):
    """Anything with a shape [z, y, x] of which a part can be had without the rest."""

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102

    def __getitem__(self, part: tuple[slice, slice, slice], /) -> Any: ...


@dataclass(frozen=True)
class Tomogram:
    """A tomogram that boxes are cut from: an MRC file, or the folder of an OME-Zarr volume.

    `voxel_size_angstrom` is None where nothing tells it.
    """

    path: Path
    shape_dhw: tuple[int, int, int]
    voxel_size_angstrom: float | None


@dataclass(frozen=True)
class Placed:
    """A particle whose position is known in the voxels of its tomogram, from 0 at the centre of the first one.

    `group` is the tomogram's name in the dataset, `where` how a person finds the particle.
    """

    particle_id: str
    label: str
    group: str
    tomogram: Tomogram
    position_zyx: tuple[float, float, float]
    where: str


@dataclass(frozen=True)
class Box:
    """A part of a tomogram: `side` voxels from `start_zyx`, which may lie outside."""

    path: Path
    start_zyx: tuple[int, int, int]
    side: int
    voxel_size_angstrom: float | None


class BoxSource(Listing):
    """Boxes of tomograms as `Source`; the `where` of each entry is a `Box`."""

    def read(self, entry: Entry) -> ReadVolume:
        """Cut one box, reading as little of the tomogram as its format allows.

        Raises:
            DataError: names the particle and what is wrong with its tomogram.
        """
        box: Box = entry.where
        with named(entry):
            volume = cut_box(_open(box.path), box.start_zyx, box.side)
        return ReadVolume(volume, box.voxel_size_angstrom)


def cut_box(tomogram: Sliceable, start_zyx: Sequence[int], side: int) -> Volume:
    """A box float32 [side, side, side] that begins at `start_zyx`, with the mean of the inside part beyond the border.

    Raises:
        DataError: no part of it is inside.
    """
    starts = [max(start, 0) for start in start_zyx]
    stops = [min(start + side, size) for start, size in zip(start_zyx, tomogram.shape, strict=True)]
    if any(start >= stop for start, stop in zip(starts, stops, strict=True)):
        raise DataError(f"the box at voxel {list(start_zyx)} is outside of the tomogram {list(tomogram.shape)}")
    z, y, x = (slice(start, stop) for start, stop in zip(starts, stops, strict=True))
    inside = np.asarray(tomogram[z, y, x], dtype=np.float32)
    if inside.shape == (side,) * 3:
        return np.ascontiguousarray(inside)
    box = np.full((side,) * 3, inside.mean(dtype=np.float64), dtype=np.float32)
    places = [slice(start - first, stop - first) for start, stop, first in zip(starts, stops, start_zyx, strict=True)]
    box[tuple(places)] = inside
    return box


def box_source(
    kind: str, particles: Sequence[Placed], side: int, *, notes: Sequence[str], provenance: dict[str, Any]
) -> BoxSource:
    """The source of all boxes of `side` voxels that fit, tomogram after tomogram, and in each near after near.

    Raises:
        DataError: none of them fits.
    """
    entries: list[Entry] = []
    padded: list[str] = []
    dropped: list[Placed] = []
    for particle in _near_by_near(particles):
        start_zyx = _start(particle.position_zyx, side)
        overhang = _overhang(start_zyx, side, particle.tomogram.shape_dhw)
        if overhang > side // 3:
            dropped.append(particle)
            continue
        if overhang > 0:
            padded.append(particle.particle_id)
        entries.append(
            Entry(
                particle_id=particle.particle_id,
                label=particle.label,
                tomogram=particle.group,
                where=Box(particle.tomogram.path, start_zyx, side, particle.tomogram.voxel_size_angstrom),
                origin=particle.where,
                position_zyx=particle.position_zyx,
            )
        )
    if dropped and not entries:
        first = dropped[0]
        position = ", ".join(f"{voxel:.1f}" for voxel in first.position_zyx)
        shape = " x ".join(map(str, first.tomogram.shape_dhw))
        raise DataError(
            f"{first.where}: none of the {len(dropped)} boxes of {side} voxels lies in its tomogram; this one is at "
            f"z, y, x = {position} of {shape} in {first.tomogram.path.name}: do voxel size and binning fit the table?"
        )
    said = [*notes]
    if padded:
        said.append(
            f"{len(padded)} boxes reach over the border of their tomogram by up to a third of their side and are "
            f"filled with the mean of the rest ({_some(padded)})"
        )
    if dropped:
        said.append(
            f"{len(dropped)} boxes reach over the border of their tomogram by more than a third of their side and are "
            f"left out ({_some([particle.particle_id for particle in dropped])})"
        )
    said.append(_CONTRAST_NOTE)
    return BoxSource(kind, tuple(entries), tuple(said), {**provenance, "cut": side})


def demanded_side(options: ReadOptions) -> int:
    """The side of the boxes in voxels of the tomogram.

    Raises:
        DataError: the user has given none, or one that cannot be.
    """
    least, most = _SIDES
    side = options.cut or options.box
    if side is None:
        raise DataError("boxes are to be cut from tomograms: give their side in voxels of the tomogram with --cut")
    if not least <= side <= most:
        raise DataError(f"--cut is {side}; a box may have {least} to {most} voxels a side")
    return side


def _near_by_near(particles: Sequence[Placed]) -> list[Placed]:
    """Sorted by tomogram, each where it occurs first, and in it by cells: what has to be read whole is read once."""
    groups: dict[Path, list[Placed]] = {}
    for particle in particles:
        groups.setdefault(particle.tomogram.path, []).append(particle)
    return [particle for group in groups.values() for particle in sorted(group, key=_cell)]


def _cell(particle: Placed) -> list[int]:
    return [math.floor(position / _CELL) for position in particle.position_zyx]


def _start(position_zyx: tuple[float, float, float], side: int) -> tuple[int, int, int]:
    z, y, x = (math.floor(position + 0.5) - side // 2 for position in position_zyx)
    return z, y, x


def _overhang(start_zyx: tuple[int, int, int], side: int, shape_dhw: tuple[int, int, int]) -> int:
    """By how many voxels the box reaches over the face that it reaches over most."""
    return max(max(-start, start + side - size) for start, size in zip(start_zyx, shape_dhw, strict=True))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_IDS_NAMED]) + (", …" if len(names) > _IDS_NAMED else "")


def _open(path: Path) -> Sliceable:
    if path.is_dir():
        from studytool.data.readers.omezarr import open_ome_zarr

        return open_ome_zarr(path)
    if read_header(path).compressed:
        state = path.stat()
        return _whole(_Version(path, state.st_size, state.st_mtime_ns))
    return map_mrc(path)


@dataclass(frozen=True)
class _Version:
    path: Path
    size: int
    changed_ns: int


@lru_cache(maxsize=1)
def _whole(version: _Version) -> Volume:
    """A compressed tomogram, kept until the next one is asked for, or this one has changed."""
    return read_mrc(version.path).volume_DHW
