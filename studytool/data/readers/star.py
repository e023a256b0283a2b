"""Particles listed in STAR files (RELION 3 to 5, Warp, M), as single 3D files or as `N@stack`.

Label, split, id and noise of a file that `studytool data export` has written are taken from its own columns.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from studytool.data.export import ID_COLUMN, LABEL_COLUMN, SNR_COLUMN, SPLIT_COLUMN
from studytool.data.particles import SPLITS
from studytool.data.readers.mrc import MrcVolume, read_mrc
from studytool.data.readers.mrcstack import count_volumes, read_volume_of_stack
from studytool.data.readers.picks import Pick
from studytool.data.readers.source import NO_TOMOGRAM_NOTE, Entry, Listing, ReadOptions, ReadVolume, named
from studytool.data.readers.startable import StarTable, is_star, read_star_table
from studytool.data.readers.tables import (
    CLASS_NOTE,
    as_triple,
    class_label,
    column_named,
    compare_voxel_sizes,
    locate_files,
    require_unique,
)
from studytool.errors import DataError, unknown_name

_CTF_NOTE = (
    "these are pseudo-subtomograms: sums over tilts, CTF-premultiplied, and no plain densities; do not mix them with "
    "subtomograms of other programs"
)
_NUMBERED = re.compile(r"(\d{1,30})@(.+)")
_CLASS = "rlnClassNumber"


def recognize(path: Path, options: ReadOptions) -> StarSource | None:
    """A STAR file as a source of volumes; None where `path` is none, or where boxes are to be cut from tomograms.

    Raises:
        DataError: the table is damaged, its images are no volumes, or files are missing or out of bounds; names the
            row.
    """
    if options.tomograms is not None or not is_star(path):
        return None
    table = read_star_table(path)
    _refuse_images(table)
    names = table.texts("rlnImageName")
    if names is None:
        raise DataError(
            f"{path}: no column rlnImageName, so no volumes; to cut boxes at the positions in it, add "
            "--tomograms FOLDER --cut N"
        )
    split = [_NUMBERED.fullmatch(name) for name in names]
    found = locate_files(
        path, [match[2] if match else name for match, name in zip(split, names, strict=True)], options.root
    )
    numbers = [int(match[1]) if match else None for match in split]
    _check_numbers(path, found.paths, numbers)
    particle_ids = _particle_ids(table)
    require_unique(path, particle_ids)
    require_unique(
        path, [str(file) if n is None else f"{n}@{file}" for n, file in zip(numbers, found.paths, strict=True)]
    )
    labels, label_notes = _labels(table, options)
    tomograms = _tomograms(table, options)
    splits = _splits(table)
    noise = table.numbers(SNR_COLUMN)
    sizes = table.voxel_sizes_angstrom()
    positions_zyx = _positions_in_voxels(table, sizes)
    entries = [
        Entry(
            particle_id=particle_ids[row],
            label=labels[row],
            tomogram=tomograms[row] if tomograms else "",
            where=_Where(found.paths[row], numbers[row], None if sizes is None else float(sizes[row])),
            origin=f"{path}, row {row + 1}",
            split=splits[row],
            snr=None if noise is None else float(noise[row]),
            position_zyx=None if positions_zyx is None else as_triple(positions_zyx[row]),
        )
        for row in range(len(names))
    ]
    kind, kind_notes = _kind(table)
    notes = [*kind_notes, *found.notes, *label_notes]
    if sizes is not None:
        notes += compare_voxel_sizes(
            sizes.tolist(), [entry.where.path for entry in entries], lambda row: entries[row].where.volume()
        )
    if not tomograms or not all(tomograms):
        notes.append(NO_TOMOGRAM_NOTE)
    return StarSource(
        kind=kind,
        entries=entries,
        notes=tuple(notes),
        provenance={"source": kind, "table": str(path), "root": str(found.root)},
    )


def picks_from_star(path: Path, options: ReadOptions) -> list[Pick]:
    """The refined position of every particle, from tables of any RELION since 3; the images are not needed.

    RELION 5 counts in Å from the tomogram's centre, RELION 4 (coordinates in voxels of the tilt series) is given in Å
    from the corner, everything else in voxels from the corner.

    Raises:
        DataError: the table is damaged, or it lacks the coordinates or the tomograms' names.
    """
    table = read_star_table(path)
    positions = table.positions()
    if positions is None:
        raise DataError(f"{path}: no coordinates (rlnCoordinateX, Y, Z or rlnCenteredCoordinateXAngst, …)")
    tomograms = _tomograms(table, options)
    if tomograms is None or not all(tomograms):
        row = "" if tomograms is None else f", row {tomograms.index('') + 1}"
        raise DataError(f"{path}{row}: the tomogram is not named (rlnTomoName or rlnMicrographName); add it")
    particle_ids = _particle_ids(table)
    require_unique(path, particle_ids)
    labels, _ = _labels(table, options)
    return [
        Pick(
            particle_id=particle_ids[row],
            label=labels[row],
            tomogram=tomograms[row],
            position_zyx=as_triple(positions.zyx[row]),
            unit=positions.unit,
            origin=positions.origin,
            where=f"{path}, row {row + 1}",
        )
        for row in range(len(particle_ids))
    ]


@dataclass(frozen=True)
class _Where:
    path: Path
    number: int | None  # from 1, in a stack of volumes
    voxel_size_angstrom: float | None  # of the table

    def volume(self) -> MrcVolume:
        return read_mrc(self.path) if self.number is None else read_volume_of_stack(self.path, self.number)


class StarSource(Listing):
    """A STAR file as `Source`; where table and volume disagree on the voxel size, the table is right."""

    def read(self, entry: Entry) -> ReadVolume:
        """Read the volume of one row.

        Raises:
            DataError: names the table's row and what is wrong with the file.
        """
        where: _Where = entry.where
        with named(entry):
            volume = where.volume()
        return ReadVolume(volume.volume_DHW, where.voxel_size_angstrom or volume.voxel_size_angstrom)


def _refuse_images(table: StarTable) -> None:
    if table.tilt_stacks:
        raise DataError(
            f"{table.path}: RELION 5 particles kept as stacks of 2D tilt images (rlnTomoSubTomosAre2DStacks 1), not as "
            "volumes; extract them again with 'Write output as 2D stacks' set to No, or cut boxes from the tomograms: "
            "--tomograms FOLDER --cut N"
        )
    dimensions = table.numbers("rlnImageDimensionality")
    if dimensions is not None and (dimensions == 2).any():
        row = int(np.flatnonzero(dimensions == 2)[0]) + 1
        raise DataError(f"{table.path}, row {row}: a 2D image (rlnImageDimensionality 2), not a volume")


def _check_numbers(table: Path, paths: Sequence[Path], numbers: Sequence[int | None]) -> None:
    """Every `N@` against the header of its stack, each of which is opened once."""
    counts: dict[Path, int] = {}
    for row, (path, number) in enumerate(zip(paths, numbers, strict=True), start=1):
        if number is None:
            continue
        if path not in counts:
            try:
                counts[path] = count_volumes(path)
            except DataError as error:
                raise DataError(f"{table}, row {row}: {error}") from error
        if not 1 <= number <= counts[path]:
            raise DataError(f"{table}, row {row}: volume {number} of {path.name}, which holds {counts[path]} (from 1)")


def _particle_ids(table: StarTable) -> list[str]:
    for column in (ID_COLUMN, "rlnTomoParticleName", "rlnImageName"):
        names = table.texts(column)
        if names is not None and all(names):
            return names
    return [f"{table.path.stem}-{row:06d}" for row in range(1, len(table.particles) + 1)]


def _labels(table: StarTable, options: ReadOptions) -> tuple[list[str], list[str]]:
    """Labels, and what has to be said of them."""
    column = None
    if options.label is None:
        column = LABEL_COLUMN if LABEL_COLUMN in table.particles else _CLASS
    if options.label_column is not None:
        column = column_named(table.path, options.label_column, table.particles.columns, "column for --label-column")
    texts = None if column is None else table.texts(column)
    if texts is None:
        return [options.label or ""] * len(table.particles), []
    if column != _CLASS:
        return texts, []
    labels = [class_label(text) for text in texts]
    return labels, [CLASS_NOTE] if any(labels) else []


def _splits(table: StarTable) -> list[str]:
    """The splits that `studytool data export` has written, "" where there are none.

    Raises:
        DataError: names the row with a split that there is not.
    """
    splits = table.texts(SPLIT_COLUMN) or [""] * len(table.particles)
    for row, split in enumerate(splits, start=1):
        if split not in (*SPLITS, ""):
            raise DataError(f"{table.path}, row {row}: {SPLIT_COLUMN}: {unknown_name('split', split, SPLITS)}")
    return splits


def _tomograms(table: StarTable, options: ReadOptions) -> list[str] | None:
    if options.group_column is not None:
        columns = table.particles.columns
        return table.texts(column_named(table.path, options.group_column, columns, "column for --group-column"))
    for column in ("rlnTomoName", "rlnMicrographName"):
        texts = table.texts(column)
        if texts is not None:
            return texts
    return None


def _positions_in_voxels(table: StarTable, sizes_angstrom: Any) -> Any:
    """Positions in voxels of the particles; None where they count from a centre whose place only the tomogram tells."""
    if sizes_angstrom is None and "rlnOriginXAngst" in table.particles:
        return None
    positions = table.positions()
    if positions is None or positions.origin == "centre":
        return None
    if positions.unit == "voxel":
        return positions.zyx
    return None if sizes_angstrom is None else positions.zyx / sizes_angstrom[:, None]


def _kind(table: StarTable) -> tuple[str, list[str]]:
    tomography = "rlnTomoParticleName" in table.particles or {"rlnTomoName", "rlnCtfImage"} <= set(table.particles)
    if "rlnCenteredCoordinateXAngst" in table.particles:
        return "RELION 5 STAR file of 3D pseudo-subtomograms", [_CTF_NOTE]
    if tomography:
        return "RELION 4 STAR file of pseudo-subtomograms", [_CTF_NOTE]
    if table.optics is not None:
        return "RELION 3.1 STAR file", []
    return "RELION 3.0, Warp or M STAR file", []
