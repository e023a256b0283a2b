"""Tomograms (MRC) and a table of positions in them: STAR, Dynamo, or CSV with x, y, z.

What positions count in and from, all brought to voxels of the tomogram from 0 at the centre of the first one:

- RELION 3, Warp, M: voxels of the pixel size in the table, which may be finer than the tomogram's, from 0.
- RELION 4: the same, of the tilt series' pixel size. RELION 5: Å from the tomogram's centre, which it has at half the
  size. (A position in Å divided by the tomogram's voxel size: binned tomograms of RELION keep the centre of voxel 0.)
- Dynamo: voxels from the outer corner of the first one, which stays where it is when voxels are binned.
- CSV: voxels of the tomogram from 0 (`x,y,z`), or Å from the centre of the first voxel (`x_angstrom,…`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import dynamotable

from studytool.data.readers.boxes import BoxSource, Placed, Tomogram, box_source, demanded_side
from studytool.data.readers.dynamo import picks_from_dynamo
from studytool.data.readers.mrc import MrcHeader, read_header
from studytool.data.readers.picks import OUTER_CORNER, Pick
from studytool.data.readers.pointcsv import is_point_csv, picks_from_csv
from studytool.data.readers.source import ReadOptions
from studytool.data.readers.star import picks_from_star
from studytool.data.readers.startable import is_star, read_star_table
from studytool.data.readers.tables import CLASS_NOTE, head_of_text
from studytool.data.readers.tomogramfiles import find_tomograms, stem_of
from studytool.errors import DataError

_SAME_SIZE = 0.01


def recognize(path: Path, options: ReadOptions) -> BoxSource | None:
    """Boxes of `options.box` voxels at positions in tomograms; None where no tomograms or coordinates are named.

    `path` is the table if `options.tomograms` names the tomograms, a folder or one file; or the tomograms if
    `options.coordinates` names the table.

    Raises:
        DataError: the table cannot be read, a tomogram is missing or not the only one its name may mean, no voxel
            size is known where one is needed, or no box lies inside.
    """
    if options.tomograms is None and options.coordinates is None:
        return None
    table_path, place = _table_and_tomograms(path, options)
    side = demanded_side(options)
    table = _read_table(table_path, options)
    names = list(dict.fromkeys(pick.tomogram for pick in table.picks))
    found = find_tomograms(place, names, table_path, options.root)
    headers = {file: read_header(file) for file in dict.fromkeys(found.files.values())}
    tomograms = {
        name: Tomogram(file, headers[file].shape_dhw, options.voxel_size_angstrom or headers[file].voxel_size_angstrom)
        for name, file in found.files.items()
    }
    particles = [
        Placed(
            particle_id=pick.particle_id,
            label=pick.label,
            group=pick.tomogram or stem_of(found.files[pick.tomogram].name),
            tomogram=tomograms[pick.tomogram],
            position_zyx=_in_voxels(pick, size, tomograms[pick.tomogram]),
            where=pick.where,
        )
        for pick, size in zip(table.picks, table.sizes_angstrom, strict=True)
    ]
    notes = [*found.notes, *table.notes, *_scale_notes(table, tomograms), *_header_notes(headers)]
    provenance = {"table": str(table_path), "tomograms": str(place)}
    return box_source(f"tomograms with a {table.kind}", particles, side, notes=notes, provenance=provenance)


@dataclass(frozen=True)
class _Table:
    """Picks, and the size in Å of the voxels that those of unit "voxel" count, None where the table does not tell."""

    kind: str
    picks: Sequence[Pick]
    sizes_angstrom: Sequence[float | None]
    notes: Sequence[str] = ()


def _table_and_tomograms(path: Path, options: ReadOptions) -> tuple[Path, Path]:
    if options.coordinates is None and options.tomograms is not None:
        return path, options.tomograms
    if options.coordinates is None:
        raise DataError(f"{path}: name the tomograms with --tomograms")
    if not options.coordinates.is_file():
        raise DataError(f"{options.coordinates}: the table of positions is not there")
    return options.coordinates, options.tomograms or path


def _read_table(path: Path, options: ReadOptions) -> _Table:
    if is_star(path):
        picks = picks_from_star(path, options)
        in_table = read_star_table(path).voxel_sizes_angstrom()
        told: list[float | None] = [None] * len(picks) if in_table is None else in_table.tolist()
        return _Table("STAR file", picks, told, _class_notes(picks, options))
    if is_point_csv(path):
        csv = picks_from_csv(path, options)
        return _Table("CSV of positions", csv.picks, [None] * len(csv.picks), csv.notes)
    first = next((line.split() for line in head_of_text(path) if line.strip()), [""])
    if re.fullmatch(r"[\d.eE+]+", first[0]):
        picks = picks_from_dynamo(path, options)
        sizes = _dynamo_sizes(path, len(picks))
        return _Table("Dynamo table", picks, sizes, _class_notes(picks, options))
    raise DataError(
        f"{path}: not a table of positions; what is read is a STAR file, a Dynamo table, or a CSV with the columns x, "
        "y, z (voxels) or x_angstrom, y_angstrom, z_angstrom"
    )


def _dynamo_sizes(path: Path, count: int) -> list[float | None]:
    """Column 36 of a table that `picks_from_dynamo` has checked; 0 where Dynamo does not know."""
    table = dynamotable.read(path)
    if "apix" not in table:
        return [None] * count
    return [float(size) if size > 0 else None for size in table["apix"]]


def _class_notes(picks: Iterable[Pick], options: ReadOptions) -> list[str]:
    from_classes = options.label is None and options.label_column is None and any(pick.label for pick in picks)
    return [CLASS_NOTE] if from_classes else []


def _in_voxels(pick: Pick, size_angstrom: float | None, tomogram: Tomogram) -> tuple[float, float, float]:
    """The position in voxels of the tomogram, from 0 at the centre of the first one.

    Raises:
        DataError: it is in Å, and nothing tells the voxel size of the tomogram.
    """
    if pick.unit == "angstrom":
        in_voxels = 1 / _known_size(pick, tomogram)
    elif size_angstrom is None or tomogram.voxel_size_angstrom is None or _same(size_angstrom, tomogram):
        in_voxels = 1.0
    else:
        in_voxels = size_angstrom / tomogram.voxel_size_angstrom
    corner = OUTER_CORNER if pick.origin == "outer corner" else 0.0
    origin = [size / 2 if pick.origin == "centre" else corner for size in tomogram.shape_dhw]
    z, y, x = (value * in_voxels + start for value, start in zip(pick.position_zyx, origin, strict=True))
    return z, y, x


def _known_size(pick: Pick, tomogram: Tomogram) -> float:
    if tomogram.voxel_size_angstrom is None:
        raise DataError(
            f"{tomogram.path}: the voxel size is not known (0, the placeholder 1.0 or uneven in the header), and the "
            f"positions are in Å ({pick.where}); give it in Å with --voxel-size"
        )
    return tomogram.voxel_size_angstrom


def _same(size_angstrom: float, tomogram: Tomogram) -> bool:
    known = tomogram.voxel_size_angstrom
    return known is not None and abs(size_angstrom / known - 1) <= _SAME_SIZE


def _scale_notes(table: _Table, tomograms: Mapping[str, Tomogram]) -> list[str]:
    """Where positions in voxels were brought to other voxels, or nothing tells whether they should have been."""
    notes: dict[str, None] = {}
    for pick, size in zip(table.picks, table.sizes_angstrom, strict=True):
        tomogram = tomograms[pick.tomogram]
        known = tomogram.voxel_size_angstrom
        if pick.unit == "angstrom" or size is None or _same(size, tomogram):
            continue
        if known is None:
            notes[
                f"the table's positions count voxels of {size:g} Å and are used as they are, since the tomograms do "
                "not tell their voxel size; if it is another, give it with --voxel-size"
            ] = None
        else:
            notes[
                f"the table's positions count voxels of {size:g} Å, those of the tomograms are of {known:g} Å: the "
                f"positions are multiplied by {size / known:.4g}"
            ] = None
    return list(notes)


def _header_notes(headers: Mapping[Path, MrcHeader]) -> list[str]:
    notes = []
    compressed = [file.name for file, header in headers.items() if header.compressed]
    if compressed:
        notes.append(
            f"{len(compressed)} tomograms are compressed ({compressed[0]}, …) and are read whole, by each process; "
            "expand them to read only the boxes"
        )
    oddities: dict[str, list[str]] = {}
    for file, header in headers.items():
        for oddity in header.oddities:
            oddities.setdefault(oddity, []).append(file.name)
    return notes + [f"{files[0]}: {oddity} ({len(files)} tomograms)" for oddity, files in oddities.items()]
