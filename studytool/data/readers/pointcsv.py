"""CSV tables of positions: `x,y,z` in voxels or `x_angstrom,y_angstrom,z_angstrom`, with `tomogram`, `label`, `id`."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from studytool.data.readers.picks import Pick
from studytool.data.readers.source import ReadOptions
from studytool.data.readers.tables import (
    as_numbers,
    as_triple,
    column_named,
    head_of_text,
    lines_of_text,
    require_unique,
)
from studytool.errors import DataError

_DELIMITERS = (",", ";", "\t")
_COLUMNS: dict[Literal["voxel", "angstrom"], tuple[str, str, str]] = {
    "voxel": ("z", "y", "x"),
    "angstrom": ("z_angstrom", "y_angstrom", "x_angstrom"),
}


@dataclass(frozen=True)
class PointCsv:
    """The picks of a table, and what the user should be told of it."""

    picks: tuple[Pick, ...]
    notes: tuple[str, ...]


def is_point_csv(path: Path) -> bool:
    """Whether the first line names the columns of a position."""
    names = _header(path)[0]
    return any(set(columns) <= set(names) for columns in _COLUMNS.values())


def picks_from_csv(path: Path, options: ReadOptions) -> PointCsv:
    """The position of every row, from the centre of the first voxel; `tomogram` is "" where there is no such column.

    Raises:
        DataError: columns are missing, doubled or in two units, or a row is not whole or holds no numbers; names it.
    """
    names, delimiter = _header(path)
    doubled = sorted({name for name in names if names.count(name) > 1})
    units = [unit for unit, columns in _COLUMNS.items() if set(columns) <= set(names)]
    if doubled or len(units) != 1:
        what = f"the column {doubled[0]!r} stands there twice" if doubled else "positions in voxels and in Å"
        raise DataError(f"{path}: {what}; keep one")
    unit = units[0]
    rows = _rows(path, names, delimiter)

    def texts(asked: str | None, usual: str, kind: str) -> list[str] | None:
        name = usual if asked is None else column_named(path, asked, names, kind)
        return [row[names.index(name)] for row in rows] if name in names else None

    zyx = np.stack(
        [as_numbers(path, name, [row[names.index(name)] for row in rows]) for name in _COLUMNS[unit]], axis=1
    )
    labels = texts(options.label_column, "label", "label column")
    tomograms = texts(options.group_column, "tomogram", "group column")
    ids = texts(None, "id", "") or [f"{path.stem}-{row:06d}" for row in range(1, len(rows) + 1)]
    require_unique(path, ids)
    if tomograms is not None and not all(tomograms):
        raise DataError(f"{path}, row {tomograms.index('') + 1}: the tomogram is not named")
    picks = tuple(
        Pick(
            particle_id=ids[row],
            label=options.label or (labels[row] if labels else ""),
            tomogram=tomograms[row] if tomograms else "",
            position_zyx=as_triple(zyx[row]),
            unit=unit,
            origin="corner",
            where=f"{path}, row {row + 1}",
        )
        for row in range(len(rows))
    )
    used = {*_COLUMNS[unit], "id", options.label_column or "label", options.group_column or "tomogram"}
    ignored = [name for name in names if name not in used]
    return PointCsv(picks, (f"the columns {', '.join(ignored)} are not used",) if ignored else ())


def _header(path: Path) -> tuple[list[str], str]:
    lines = head_of_text(path)
    if not lines:
        return [], ","
    delimiter = max(_DELIMITERS, key=lines[0].count)
    return [name.strip() for name in next(csv.reader([lines[0]], delimiter=delimiter), [])], delimiter


def _rows(path: Path, names: list[str], delimiter: str) -> list[list[str]]:
    lines = (line for _, line in lines_of_text(path) if line)
    rows = []
    try:
        for number, row in enumerate(csv.reader(lines, delimiter=delimiter, strict=True)):
            if len(row) != len(names):
                raise DataError(f"{path}, row {number}: {len(row)} values, the header names {len(names)} columns")
            if number:
                rows.append([value.strip() for value in row])
    except csv.Error as error:
        raise DataError(f"{path}: not a CSV that can be read: {error}") from error
    if not rows:
        raise DataError(f"{path}: no rows under the header")
    return rows
