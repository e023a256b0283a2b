"""Runs with tomograms and points, as copick projects and the CryoET Data Portal have them -> boxes at the points."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from studytool.data.readers.boxes import BoxSource, Placed, Tomogram, box_source, demanded_side
from studytool.data.readers.mrc import read_header
from studytool.data.readers.omezarr import open_ome_zarr
from studytool.data.readers.source import ReadOptions
from studytool.data.readers.tables import as_triple
from studytool.data.readers.tomogramfiles import require_inside
from studytool.errors import DataError, unknown_name

_SAME_SIZE = 0.01

Points = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class RunTomogram:
    """A reconstruction of a run: an MRC file or the folder of an OME-Zarr volume.

    `kinds` are the names under which it can be chosen, the one that other runs share first. `alignment` is "" where it
    is not known.
    """

    run: str
    spacing_angstrom: float
    kinds: tuple[str, ...]
    path: Path
    alignment: str = ""


@dataclass(frozen=True)
class RunPicks:
    """The points of one object in a run, by one annotator ("USER/SESSION", or the number of an annotation).

    `load` reads them: float64 [point, (z, y, x)], in Å from the centre of the first voxel. `spacing_angstrom` is that
    of the tomograms they belong to, None if they fit all of the run.
    """

    run: str
    label: str
    by: str
    path: Path
    load: Callable[[], Points]
    spacing_angstrom: float | None = None
    alignment: str = ""


def source_of_runs(
    kind: str, place: Path, tomograms: Sequence[RunTomogram], picks: Sequence[RunPicks], options: ReadOptions
) -> BoxSource:
    """Boxes around all points, from one kind of tomogram; the run is the group that may not be split.

    Raises:
        DataError: there are several kinds of tomograms, or several annotations of one object in a run, and the options
            do not choose; a tomogram or table cannot be read; or nothing is left.
    """
    side = demanded_side(options)
    if not tomograms or not picks:
        raise DataError(f"{place}: {kind} without {'points' if tomograms else 'tomograms'}; nothing can be cut")
    chosen = _chosen_tomograms(place, tomograms, options)
    spacing = next(iter(chosen.values())).spacing_angstrom
    fitting = [pick for pick in picks if pick.spacing_angstrom is None or _same(pick.spacing_angstrom, spacing)]
    used = _chosen_picks(place, fitting, options)
    notes: list[str] = []
    without = sorted({pick.run for pick in used if pick.run not in chosen})
    if without:
        notes.append(f"{len(without)} runs have points but no such tomogram and are left out, the first {without[0]}")
    used = [pick for pick in used if pick.run in chosen]
    elsewhere = [pick for pick in used if not _one_alignment(pick, chosen[pick.run])]
    if elsewhere:
        notes.append(
            f"{len(elsewhere)} annotations belong to another alignment of the tilt series than the tomogram and are "
            f"left out, the first {elsewhere[0].path}"
        )
    used = [pick for pick in used if _one_alignment(pick, chosen[pick.run])]
    if not used:
        raise DataError(f"{place}: no points belong to the tomograms of {spacing:g} Å; {'; '.join(notes)}".rstrip("; "))
    real_root = Path(os.path.realpath(options.root or place))
    opened = {run: _opened(chosen[run], real_root, notes) for run in dict.fromkeys(pick.run for pick in used)}
    particles = [particle for pick in used for particle in _placed(pick, opened[pick.run], real_root)]
    if not particles:
        raise DataError(f"{place}: {len(used)} lists of points, and all are empty")
    provenance = {"path": str(place), "spacing_angstrom": spacing, "tomograms": chosen[used[0].run].kinds[0]}
    return box_source(kind, particles, side, notes=notes, provenance=provenance)


def _chosen_tomograms(place: Path, tomograms: Sequence[RunTomogram], options: ReadOptions) -> dict[str, RunTomogram]:
    size, kind = options.voxel_size_angstrom, options.tomogram_type
    fitting = [
        tomogram
        for tomogram in tomograms
        if (size is None or _same(tomogram.spacing_angstrom, size)) and (kind is None or kind in tomogram.kinds)
    ]
    if not fitting:
        asked = " ".join(([f"of {size:g} Å"] if size else []) + ([f"of the type {kind!r}"] if kind else []))
        raise DataError(f"{place}: no tomogram {asked}; there are {_listed(tomograms)}")
    if len({(tomogram.spacing_angstrom, tomogram.kinds[0]) for tomogram in fitting}) > 1:
        raise DataError(
            f"{place}: several kinds of tomograms: {_listed(fitting)}; choose one with --tomogram-type and --voxel-size"
        )
    chosen: dict[str, RunTomogram] = {}
    for tomogram in fitting:
        other = chosen.setdefault(tomogram.run, tomogram)
        if other is not tomogram:
            names = " or ".join(dict.fromkeys(repr(name) for t in (other, tomogram) for name in t.kinds[1:]))
            raise DataError(
                f"{place}: run {tomogram.run} has several such tomograms, {other.path} and {tomogram.path}; choose one "
                f"with --tomogram-type {names}"
            )
    return chosen


def _chosen_picks(place: Path, picks: Sequence[RunPicks], options: ReadOptions) -> list[RunPicks]:
    wanted = options.picks_of
    fitting = [pick for pick in picks if wanted is None or pick.by == wanted or pick.by.startswith(f"{wanted}/")]
    if picks and not fitting:
        raise DataError(f"{place}: --picks-of: {unknown_name('annotation', wanted, {pick.by for pick in picks})}")
    first: dict[tuple[str, str], RunPicks] = {}
    for pick in fitting:
        other = first.setdefault((pick.run, pick.label), pick)
        if other is not pick:
            raise DataError(
                f"{place}: {pick.label!r} in run {pick.run} is annotated more than once, by {other.by!r} and "
                f"{pick.by!r} ({other.path.name}, {pick.path.name}); the same particle could come in twice: choose "
                "with --picks-of"
            )
    return fitting


def _opened(tomogram: RunTomogram, real_root: Path, notes: list[str]) -> Tomogram:
    """The tomogram with its shape; the spacing of the folder is right, and a note says where the file differs."""
    require_inside(tomogram.path, real_root)
    shape_dhw: tuple[int, int, int]
    if tomogram.path.is_dir():
        zarr = open_ome_zarr(tomogram.path)
        require_inside(zarr.folder, real_root)
        shape_dhw, size = zarr.shape, zarr.voxel_size_angstrom
    else:
        header = read_header(tomogram.path)
        shape_dhw, size = header.shape_dhw, header.voxel_size_angstrom
    if size is not None and not _same(size, tomogram.spacing_angstrom):
        notes.append(
            f"{tomogram.path}: says its voxels are of {size:g} Å, its folder {tomogram.spacing_angstrom:g} Å; the "
            "latter is used"
        )
    return Tomogram(tomogram.path, shape_dhw, tomogram.spacing_angstrom)


def _placed(pick: RunPicks, tomogram: Tomogram, real_root: Path) -> Iterable[Placed]:
    require_inside(pick.path, real_root)
    points = pick.load()
    bad = np.flatnonzero(~np.isfinite(points).all(axis=1))
    if bad.size:
        raise DataError(f"{pick.path}, point {bad[0] + 1}: a coordinate is not finite")
    assert tomogram.voxel_size_angstrom is not None
    for number, position_zyx in enumerate(points / tomogram.voxel_size_angstrom, start=1):
        yield Placed(
            particle_id=f"{pick.run}/{pick.label}/{pick.by}/{number:06d}",
            label=pick.label,
            group=pick.run,
            tomogram=tomogram,
            position_zyx=as_triple(position_zyx),
            where=f"{pick.path}, point {number}",
        )


def _one_alignment(pick: RunPicks, tomogram: RunTomogram) -> bool:
    return not pick.alignment or not tomogram.alignment or pick.alignment == tomogram.alignment


def _same(size_angstrom: float, other_angstrom: float) -> bool:
    return abs(size_angstrom / other_angstrom - 1) <= _SAME_SIZE


def _listed(tomograms: Iterable[RunTomogram]) -> str:
    counts = Counter((tomogram.kinds[0], tomogram.spacing_angstrom) for tomogram in tomograms)
    return ", ".join(f"{kind!r} of {size:g} Å ({count} runs)" for (kind, size), count in sorted(counts.items()))
