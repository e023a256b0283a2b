"""STAR files of RELION, Warp and M -> a checked table of particles: text columns, pixel sizes, positions.

Everything is kept as text until it is known to be a number, since `0012` is a name. Columns and blocks are those of
RELION's documentation (https://relion.readthedocs.io, "Conventions" and "Subtomogram averaging").
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pandas as pd
import starfile
from scipy.spatial.transform import Rotation

from studytool.data.readers.tables import MAX_COLUMNS, as_numbers, head_of_text, lines_of_text
from studytool.errors import DataError

_CENTRED = ("rlnCenteredCoordinateXAngst", "rlnCenteredCoordinateYAngst", "rlnCenteredCoordinateZAngst")
_COORDINATES = ("rlnCoordinateX", "rlnCoordinateY", "rlnCoordinateZ")
_SHIFTS_ANGSTROM = ("rlnOriginXAngst", "rlnOriginYAngst", "rlnOriginZAngst")
_SHIFTS_VOXELS = ("rlnOriginX", "rlnOriginY", "rlnOriginZ")
_SUBTOMOGRAM_ANGLES = ("rlnTomoSubtomogramRot", "rlnTomoSubtomogramTilt", "rlnTomoSubtomogramPsi")
_FIELD = re.compile(r'"[^"]*"|[^ \t]+')
_LOOK_FOR = "look for quotation marks without a partner and for comments between the names of columns"

Numbers = np.ndarray[Any, np.dtype[np.float64]]


def is_star(path: Path) -> bool:
    """Whether the first thing in the file, after comments, is the head of a STAR block."""
    for line in head_of_text(path):
        text = line.strip()
        if text and not text.startswith("#"):
            return text.startswith("data_") and len(text.split()) == 1
    return False


def read_star_table(path: Path) -> StarTable:
    """Read the table of particles and what the blocks beside it say.

    Raises:
        DataError: the file is no whole STAR file, or it has no table of particles, or several.
    """
    outline = _outline(path)
    columns = {column for block in outline.values() for column in block.columns}
    try:
        blocks = starfile.read(path, always_dict=True, parse_as_string=sorted(columns))
    except (ValueError, TypeError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: cannot be read as a STAR file ({reason}); {_LOOK_FOR}") from error
    frames = {name: _frame(block) for name, block in blocks.items()}
    for name, block in outline.items():
        frame = frames.get(name, pd.DataFrame())
        if list(frame.columns) != block.columns or len(frame) != block.rows:
            raise DataError(
                f"{path}: block data_{name} has {block.rows} rows of {len(block.columns)} columns, {len(frame)} of "
                f"{len(frame.columns)} can be read; {_LOOK_FOR}"
            )
    name = _name_of_particles(path, frames)
    if frames[name].empty:
        raise DataError(f"{path}: block data_{name} lists no particles")
    general = frames.get("general", pd.DataFrame())
    return StarTable(
        path=path,
        particles=frames[name],
        optics=frames.get("optics"),
        tilt_stacks="rlnTomoSubTomosAre2DStacks" in general and general["rlnTomoSubTomosAre2DStacks"].iloc[0] == "1",
        block=name,
    )


@dataclass(frozen=True)
class Positions:
    """Refined positions [particle, (z, y, x)] in tomograms, and what they count in and from."""

    zyx: Numbers
    unit: Literal["voxel", "angstrom"]
    origin: Literal["corner", "centre"]


@dataclass(frozen=True)
class StarTable:
    """The particles, all columns as text, with the optics block if there is one.

    `tilt_stacks`: the images are stacks of tilts (RELION 5), not volumes. `block` is the name of their block.
    """

    path: Path
    particles: pd.DataFrame
    optics: pd.DataFrame | None
    tilt_stacks: bool
    block: str = "particles"

    def texts(self, column: str) -> list[str] | None:
        """A column as text, None where there is none."""
        return [str(text) for text in self.particles[column]] if column in self.particles else None

    def numbers(self, column: str) -> Numbers | None:
        """A column as numbers, from the particle's row or from the row of its optics group; None where there is none.

        Raises:
            DataError: names the row without a number, or without an optics group.
        """
        if column in self.particles:
            return as_numbers(self.path, column, list(self.particles[column]))
        if self.optics is None or column not in self.optics or self.optics.empty:
            return None
        values = as_numbers(self.path, f"{column} of data_optics", list(self.optics[column]))
        groups = self.texts("rlnOpticsGroup")
        if groups is None or "rlnOpticsGroup" not in self.optics:
            return np.full(len(self.particles), values[0]) if len(values) == 1 else None
        value_of_group = dict(zip(map(str, self.optics["rlnOpticsGroup"]), values, strict=True))
        for row, group in enumerate(groups, start=1):
            if group not in value_of_group:
                raise DataError(
                    f"{self.path}, row {row}: optics group {group} is not in data_optics; it has "
                    f"{', '.join(value_of_group)}"
                )
        return np.array([value_of_group[group] for group in groups])

    def voxel_sizes_angstrom(self) -> Numbers | None:
        """The voxel size of every particle; None where the table does not tell.

        Raises:
            DataError: one is not above zero; names the row.
        """
        sizes = self.numbers("rlnImagePixelSize")
        if sizes is None:
            sizes = self.numbers("rlnPixelSize")
        if sizes is None:
            detector_micrometre = self.numbers("rlnDetectorPixelSize")
            magnification = self.numbers("rlnMagnification")
            if detector_micrometre is None or magnification is None:
                return None
            with np.errstate(divide="ignore", invalid="ignore"):
                sizes = 10_000 * detector_micrometre / magnification
        bad = np.flatnonzero(~(np.isfinite(sizes) & (sizes > 0)))
        if bad.size:
            raise DataError(f"{self.path}, row {bad[0] + 1}: the pixel size is {sizes[bad[0]]:g} Å; mend the table")
        return sizes

    def positions(self) -> Positions | None:
        """Coordinate less origin shift, None where the table has no coordinates.

        The shift counts along the axes of the extracted subtomogram, which RELION 4 and 5 may have turned
        (rlnTomoSubtomogramRot, Tilt, Psi). Positions are in Å wherever the table tells how large a voxel is that the
        coordinates count in.

        Raises:
            DataError: shifts are in Å and nothing tells the pixel size; or a number is missing, names the row.
        """
        shift_angstrom = self._xyz(_SHIFTS_ANGSTROM)
        shift_voxels = self._xyz(_SHIFTS_VOXELS)
        angles = self._xyz(_SUBTOMOGRAM_ANGLES)
        if angles is not None and shift_angstrom is not None:
            shift_angstrom = Rotation.from_euler("ZYZ", angles, degrees=True).inv().apply(shift_angstrom)
        centred = self._xyz(_CENTRED)
        if centred is not None:
            return Positions(_zyx(centred - _or_zero(shift_angstrom)), "angstrom", "centre")
        coordinates = self._xyz(_COORDINATES)
        if coordinates is None:
            return None
        tilt_series_angstrom = self.numbers("rlnTomoTiltSeriesPixelSize")
        if tilt_series_angstrom is not None:
            scaled = coordinates * tilt_series_angstrom[:, None]
            return Positions(_zyx(scaled - _or_zero(shift_angstrom)), "angstrom", "corner")
        if shift_angstrom is not None and shift_angstrom.any():
            sizes = self.voxel_sizes_angstrom()
            if sizes is None:
                raise DataError(
                    f"{self.path}: {_SHIFTS_ANGSTROM[0]} is in Å, and no column tells the pixel size to turn it into "
                    "voxels; add rlnPixelSize"
                )
            return Positions(_zyx(coordinates - shift_angstrom / sizes[:, None]), "voxel", "corner")
        return Positions(_zyx(coordinates - _or_zero(shift_voxels)), "voxel", "corner")

    def _xyz(self, columns: Sequence[str]) -> Numbers | None:
        if any(column not in self.particles for column in columns):
            return None
        return np.stack([cast(Numbers, self.numbers(column)) for column in columns], axis=1)


def _or_zero(shift: Numbers | None) -> Numbers | float:
    return 0.0 if shift is None else shift


def _zyx(positions_xyz: Numbers) -> Numbers:
    return positions_xyz[:, ::-1].copy()


@dataclass
class _Block:
    columns: list[str] = field(default_factory=list)
    rows: int = 0
    loop: bool = False


def _outline(path: Path) -> dict[str, _Block]:
    """Blocks with their columns and number of rows, each row counted and found whole before anything is parsed."""
    blocks: dict[str, _Block] = {}
    block: _Block | None = None
    for number, line in lines_of_text(path):
        text = line.split(" #")[0].split("\t#")[0].rstrip()
        if not text or text.startswith("#"):
            continue
        where = f"{path}, line {number}"
        if text.startswith("data_") and "/" not in text:  # else it is the path of a particle
            if len(text.split()) > 1 or text[5:] in blocks:
                raise DataError(f"{where}: {text[:60]!r} starts a block, whose name has to be one word and its own")
            block = blocks[text[5:]] = _Block()
        elif block is None:
            raise DataError(f"{where}: {text[:60]!r} stands before the first block (data_…); that is no STAR file")
        elif text.startswith("loop_") and not block.columns:
            block.loop = True
        elif text.startswith("_") and not (block.loop and block.rows):
            block.columns.append(text.split()[0][1:])
            block.rows = 0 if block.loop else 1
            if block.columns[-1] in block.columns[:-1]:
                raise DataError(f"{where}: the column {block.columns[-1][:60]!r} stands there twice; keep one")
            if len(block.columns) > MAX_COLUMNS:
                raise DataError(f"{where}: more than {MAX_COLUMNS} columns; that is no table of particles")
        else:
            _check_row(where, text, block)
            block.rows += 1
    for name, block in blocks.items():
        if not block.columns:
            raise DataError(f"{path}: block data_{name} is empty; take it out")
    return blocks


def _check_row(where: str, text: str, block: _Block) -> None:
    if "#" in text and '"' not in text and "'" not in text:
        raise DataError(f"{where}: '#' inside a name; a STAR file takes what follows for a comment: rename it")
    found = len(_FIELD.findall(text.replace("'", '"')))
    if found != len(block.columns):
        raise DataError(f"{where}: {found} values, the block has {len(block.columns)} columns; the row is not whole")


def _frame(block: Any) -> pd.DataFrame:
    """A block as a table of text; one of single values has one row."""
    frame = block if isinstance(block, pd.DataFrame) else pd.DataFrame([block])
    return frame.astype(object).where(frame.notna(), "")


def _name_of_particles(path: Path, frames: dict[str, pd.DataFrame]) -> str:
    if "particles" in frames:
        return "particles"
    found = [
        name
        for name, frame in frames.items()
        if any(column in frame for column in ("rlnImageName", _COORDINATES[0], _CENTRED[0]))
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(
            f"{path}: {len(found)} blocks could be the table of particles ({', '.join(f'data_{n}' for n in found)}); "
            "keep one, or name it data_particles"
        )
    raise DataError(
        f"{path}: no table of particles: no block named data_particles, and none with rlnImageName or rlnCoordinateX "
        f"(blocks: {', '.join(f'data_{name}' for name in frames) or 'none'})"
    )
