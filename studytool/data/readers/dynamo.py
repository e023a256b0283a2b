"""Dynamo tables (`.tbl`) with the folder of EM or MRC volumes that they number.

Source of the columns: https://wiki.dynamo.biozentrum.unibas.ch, "Table convention". Positions count voxels from the
outer corner of the first one, whose centre is 0.5 ("Volume center").
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dynamotable
import numpy as np
import pandas as pd

from studytool.data.readers.em import looks_like_em, read_em
from studytool.data.readers.mrc import read_mrc
from studytool.data.readers.picks import OUTER_CORNER, Pick
from studytool.data.readers.source import NO_TOMOGRAM_NOTE, Entry, Listing, ReadOptions, ReadVolume, named
from studytool.data.readers.tables import (
    CLASS_NOTE,
    MAX_COLUMNS,
    as_numbers,
    as_triple,
    class_label,
    column_named,
    compare_voxel_sizes,
    head_of_text,
    lines_of_text,
    require_unique,
)
from studytool.errors import DataError

_KIND = "Dynamo table"
_FEWEST_COLUMNS = 26  # up to the coordinates
_VOLUME = re.compile(r"particle_0*(\d+)\.(em|mrc)")
_TOMOGRAM_MAPS = ("{stem}.doc", "indices_column20.doc")


def recognize(path: Path, options: ReadOptions) -> DynamoSource | None:
    """A Dynamo table as a source of volumes; None where `path` is none, or where boxes are to be cut from tomograms.

    The volumes are `particle_<tag>.em` or `.mrc` in `options.volumes`, in the table's folder, or in a folder beside it
    named `particles` or something ending in `Particles`.

    Raises:
        DataError: the table is damaged, or volumes are missing, twice there or out of bounds; names the row.
    """
    if options.tomograms is not None or not _is_table(path):
        return None
    table = _read_table(path)
    tags = _tags(path, table)
    labels, notes = _labels(path, table, options)
    tomograms = _tomograms(path, table, options)
    positions_zyx = _positions_zyx(path, table) + OUTER_CORNER
    sizes = _voxel_sizes_angstrom(path, table)
    paths = _volumes(path, tags, options)
    if sizes is not None:
        notes += compare_voxel_sizes(sizes, paths, lambda row: _read_volume(paths[row]))
    if not all(tomograms):
        notes.append(NO_TOMOGRAM_NOTE)
    entries = [
        Entry(
            particle_id=str(tags[row]),
            label=labels[row],
            tomogram=tomograms[row],
            where=(paths[row], None if sizes is None else sizes[row]),
            origin=f"{path}, row {row + 1}",
            position_zyx=as_triple(positions_zyx[row]),
        )
        for row in range(len(tags))
    ]
    return DynamoSource(_KIND, entries, tuple(notes), {"source": _KIND, "table": str(path)})


def picks_from_dynamo(path: Path, options: ReadOptions) -> list[Pick]:
    """The refined position of every particle: x + dx, y + dy, z + dz, in voxels from the tomogram's outer corner.

    Raises:
        DataError: `path` is no Dynamo table or a damaged one, or a row names no tomogram.
    """
    if not _is_table(path):
        raise DataError(f"{path}: not a Dynamo table, which has rows of {_FEWEST_COLUMNS} numbers and more")
    table = _read_table(path)
    tags = _tags(path, table)
    labels, _ = _labels(path, table, options)
    tomograms = _tomograms(path, table, options)
    positions_zyx = _positions_zyx(path, table)
    if not all(tomograms):
        raise DataError(f"{path}, row {tomograms.index('') + 1}: no tomogram (column 20 is 0); number the tomograms")
    return [
        Pick(
            particle_id=str(tags[row]),
            label=labels[row],
            tomogram=tomograms[row],
            position_zyx=as_triple(positions_zyx[row]),
            unit="voxel",
            origin="outer corner",
            where=f"{path}, row {row + 1}",
        )
        for row in range(len(tags))
    ]


class DynamoSource(Listing):
    """A Dynamo table as `Source`; `where` is the path of a volume and the voxel size in the table, which is right."""

    def read(self, entry: Entry) -> ReadVolume:
        """Read the volume of one row.

        Raises:
            DataError: names the table's row and what is wrong with the file.
        """
        path, size_angstrom = entry.where
        with named(entry):
            volume = _read_volume(path)
        return ReadVolume(volume.volume_DHW, size_angstrom or volume.voxel_size_angstrom)


def _read_volume(path: Path) -> ReadVolume:
    if looks_like_em(path):
        return read_em(path)
    mrc = read_mrc(path)
    return ReadVolume(mrc.volume_DHW, mrc.voxel_size_angstrom)


def _is_table(path: Path) -> bool:
    """Whether the first row has the numbers of a Dynamo table: a whole tag, two flags, and at least 26 columns."""
    row = next((line.split() for line in head_of_text(path) if line.strip()), [])
    if len(row) < _FEWEST_COLUMNS:
        return False
    try:
        numbers = [float(text) for text in row[:_FEWEST_COLUMNS]]
    except ValueError:
        return False
    return numbers[0] > 0 and numbers[0].is_integer() and {numbers[1], numbers[2]} <= {0.0, 1.0}


def _read_table(path: Path) -> pd.DataFrame:
    count = rows = 0
    for number, line in lines_of_text(path):
        fields = len(line.split())
        if not fields:
            continue
        rows += 1
        count = count or fields
        if fields != count or fields > MAX_COLUMNS:
            raise DataError(f"{path}, line {number}: {fields} values, the first row has {count}; the row is not whole")
    try:
        table: pd.DataFrame = dynamotable.read(path)
    except ValueError as error:
        raise DataError(f"{path}: cannot be read as a Dynamo table: {str(error).splitlines()[0]}") from error
    if table.shape != (rows, count):
        raise DataError(f"{path}: {rows} rows of {count} columns, of which {table.shape} can be read; look for quotes")
    return table


def _tags(path: Path, table: pd.DataFrame) -> list[int]:
    numbers = as_numbers(path, "the tag (column 1)", list(table["tag"]))
    for row, number in enumerate(numbers, start=1):
        if number < 0 or number != int(number):
            raise DataError(f"{path}, row {row}: the tag (column 1) is {number:g}, it has to be a whole number")
    tags = [int(number) for number in numbers]
    require_unique(path, [str(tag) for tag in tags])
    return tags


def _labels(path: Path, table: pd.DataFrame, options: ReadOptions) -> tuple[list[str], list[str]]:
    """Labels, and what has to be said of them; columns of numbers give names such as "annotation 3"."""
    column = "class" if options.label is None else None
    if options.label_column is not None:
        column = column_named(path, options.label_column, table.columns, "column for --label-column")
    if column is None:
        return [options.label or ""] * len(table), []
    numbers = [f"{value:g}" for value in as_numbers(path, column, list(table[column]))]
    if column != "class":
        return [f"{column} {number}" for number in numbers], []
    labels = [class_label(number) for number in numbers]
    return labels, [CLASS_NOTE] if any(labels) else []


def _tomograms(path: Path, table: pd.DataFrame, options: ReadOptions) -> list[str]:
    """The tomogram's name by the map beside the table, else its number; "" for 0, which Dynamo has for none."""
    column = "tomo"
    if options.group_column is not None:
        column = column_named(path, options.group_column, table.columns, "column for --group-column")
    numbers = [f"{value:g}" for value in as_numbers(path, column, list(table[column]))]
    names = _tomogram_names(path) if column == "tomo" else {}
    return ["" if number == "0" else names.get(number, number) for number in numbers]


def _tomogram_names(path: Path) -> dict[str, str]:
    """Names by number from a `.doc` file beside the table, rows of a number and a file name."""
    for pattern in _TOMOGRAM_MAPS:
        file = path.with_name(pattern.format(stem=path.stem))
        if file.is_file():
            rows = [(number, line.split()) for number, line in lines_of_text(file) if line]
            for number, row in rows:
                if len(row) != 2 or not re.fullmatch(r"\d{1,18}", row[0]):
                    raise DataError(f"{file}, line {number}: it has to be a tomogram's number and its file name")
            return {str(int(row[0])): row[1] for _, row in rows}
    return {}


def _positions_zyx(path: Path, table: pd.DataFrame) -> Any:
    columns = {name: as_numbers(path, name, list(table[name])) for name in ("x", "y", "z", "dx", "dy", "dz")}
    return np.stack([columns[axis] + columns[f"d{axis}"] for axis in "zyx"], axis=1)


def _voxel_sizes_angstrom(path: Path, table: pd.DataFrame) -> list[float] | None:
    """Column 36, where all rows have it; Dynamo writes 0 where it does not know."""
    if "apix" not in table:
        return None
    sizes = as_numbers(path, "apix", list(table["apix"]))
    return sizes.tolist() if (sizes > 0).all() else None


def _volumes(table: Path, tags: Sequence[int], options: ReadOptions) -> list[Path]:
    """The volume of each tag, by one listing of the folder."""
    folder, files = _folder_of_volumes(table, options)
    real_root = Path(os.path.realpath(options.root or folder))
    paths: list[Path] = []
    missing: list[str] = []
    for row, tag in enumerate(tags, start=1):
        names = files.get(tag, [])
        if not names:
            missing.append(f"row {row}: {folder / f'particle_{tag:06d}.em'}")
            continue
        if len(names) > 1:
            raise DataError(
                f"{table}, row {row}: {' and '.join(sorted(names))} in {folder} have the same tag; keep one"
            )
        path = folder / names[0]
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(real_root):
            raise DataError(f"{table}, row {row}: {path} is a link out of {real_root}, and nothing is read from there")
        paths.append(path)
    if missing:
        raise DataError(
            f"{table}: {len(missing)} of {len(tags)} volumes are missing, the first in {missing[0]} (or .mrc); name "
            "their folder with --volumes"
        )
    return paths


def _folder_of_volumes(table: Path, options: ReadOptions) -> tuple[Path, dict[int, list[str]]]:
    if options.volumes is not None:
        if not options.volumes.is_dir():
            raise DataError(f"{options.volumes}: the folder of volumes is not there")
        return options.volumes, _files_by_tag(options.volumes)
    beside = sorted(folder for folder in table.parent.iterdir() if folder.is_dir())
    named = [folder for folder in beside if folder.name == "particles" or folder.name.endswith("Particles")]
    with_volumes = [(folder, files) for folder in [table.parent, *named] if (files := _files_by_tag(folder))]
    if len(with_volumes) > 1:
        names = ", ".join(str(folder) for folder, _ in with_volumes)
        raise DataError(f"{table}: volumes in {len(with_volumes)} folders ({names}); name the one with --volumes")
    return with_volumes[0] if with_volumes else (table.parent, {})


def _files_by_tag(folder: Path) -> dict[int, list[str]]:
    files: dict[int, list[str]] = {}
    for name in os.listdir(folder):  # noqa: PTH208 - names are enough, of folders with very many files
        match = _VOLUME.fullmatch(name)
        if match:
            files.setdefault(int(match[1]), []).append(name)
    return files
