"""What readers of particle tables share: text that is safe to parse, class numbers as labels, files under a root."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from studytool.errors import DataError, unknown_name

CLASS_NOTE = (
    "the labels are class numbers of the table, that is another program's output and no ground truth; name a column "
    "with --label-column, or one label with --label, if there is something better"
)
MAX_COLUMNS = 1000
_MAX_BYTES = 2**30
_MAX_LINE_CHARACTERS = 100_000
_HEAD_BYTES = 65536
_PARENTS_TRIED = 3
_NAMES_TRIED = 20  # some files may be missing; a folder that has none of the first twenty is not the root
_MAX_NAME = 2000  # characters of a path and bytes of each part, within what file systems take
_MAX_PART = 255
_SIZES_COMPARED = 10
_WINDOWS_ROOT = re.compile(r"^(?:[A-Za-z]:)?[\\/]*")


def head_of_text(path: Path) -> list[str]:
    """The first lines of a text file; none where `path` is no file, holds no UTF-8 text or cannot be opened."""
    if not path.is_file():
        return []
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return []  # whatever reads the file in the end says why it cannot
    if b"\0" in head:
        return []
    return head.decode("utf-8-sig", errors="replace").splitlines()


def lines_of_text(path: Path) -> Iterator[tuple[int, str]]:
    """The number (from 1) and the stripped text of every line.

    Raises:
        DataError: the file is too large for a table, a line too long, or the content is no UTF-8 text.
    """
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise DataError(f"{path}: {size} bytes; a table of particles may have {_MAX_BYTES}: split it into several")
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE_CHARACTERS + 1), ""), start=1):
                if len(line) > _MAX_LINE_CHARACTERS or "\0" in line:
                    raise DataError(f"{path}, line {number}: more than {_MAX_LINE_CHARACTERS} characters, or no text")
                yield number, line.strip()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not text (byte {error.start} is no UTF-8): no table of particles, or one to save as UTF-8"
        ) from error


def class_label(number: str) -> str:
    """ "class 3" for "3"; "" for what tables write where there is no class: nothing, 0, -999 or nan."""
    try:
        value = float(number)
    except ValueError:
        return number
    return f"class {value:g}" if value > 0 else ""


def column_named(path: Path, asked: str, columns: Iterable[str], kind: str) -> str:
    """The column a user means, with or without the leading underscore of STAR files.

    Raises:
        DataError: there is none of that name; the near ones are named.
    """
    known = [column for column in columns if column]
    name = asked.removeprefix("_")
    if name not in known:
        raise DataError(f"{path}: {unknown_name(kind, asked, known)}")
    return name


def require_unique(path: Path, particle_ids: Sequence[str]) -> None:
    """Refuse a table that lists a particle twice: the two could come to stand in different splits.

    Raises:
        DataError: names both rows.
    """
    rows: dict[str, int] = {}
    for row, particle_id in enumerate(particle_ids, start=1):
        if particle_id in rows:
            raise DataError(
                f"{path}, row {row}: the particle {particle_id!r} stands in row {rows[particle_id]} already; "
                "remove the duplicates"
            )
        rows[particle_id] = row


def as_numbers(path: Path, column: str, texts: Sequence[Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A column as float64.

    Raises:
        DataError: names the row that holds no finite number.
    """
    import pandas as pd  # which takes a second; not every source has a table

    numbers = pd.to_numeric(pd.Series(list(texts), dtype="object"), errors="coerce").to_numpy(np.float64)
    bad = np.flatnonzero(~np.isfinite(numbers))
    if bad.size:
        raise DataError(f"{path}, row {bad[0] + 1}: {column} is {texts[bad[0]]!r}, it has to be a finite number")
    return numbers


def as_triple(position_zyx: Sequence[float]) -> tuple[float, float, float]:
    """A row of an array as plain numbers."""
    z, y, x = (float(value) for value in position_zyx)
    return z, y, x


def compare_voxel_sizes(
    sizes_angstrom: Sequence[float], paths: Sequence[Path], volume_of_row: Callable[[int], _WithVoxelSize]
) -> list[str]:
    """Notes where a table and the header of the first volume of each of its voxel sizes differ by more than 1%.

    A volume that cannot be read is passed over: it is reported with its row when the volumes are read.
    """
    sizes, firsts, counts = np.unique(np.asarray(sizes_angstrom), return_index=True, return_counts=True)
    notes = []
    for size, first, count in list(zip(sizes.tolist(), firsts.tolist(), counts.tolist(), strict=True))[
        :_SIZES_COMPARED
    ]:
        try:
            in_header = volume_of_row(first).voxel_size_angstrom
        except DataError:
            continue
        if in_header is not None and abs(in_header - size) > 0.01 * size:
            notes.append(
                f"the table gives a voxel size of {size:g} Å ({count} particles), the header of {paths[first].name} "
                f"{in_header:g} Å; the table's is used"
            )
    return notes


class _WithVoxelSize(Protocol):
    @property
    def voxel_size_angstrom(self) -> float | None: ...


@dataclass(frozen=True)
class FoundFiles:
    """The file of every row, the root they lie under, and what the user should be told of how they were found."""

    paths: tuple[Path, ...]
    root: Path
    notes: tuple[str, ...]


def locate_files(table: Path, names: Sequence[str], root: Path | None) -> FoundFiles:
    """Find the files that the rows of a table name; nothing outside the root is touched.

    The root is the given one or, without it, the nearest of the table's folder and its three parents that has the
    files. Windows paths are converted; of one with a drive letter, the folders that are not here are left out, as
    many in each row.

    Raises:
        DataError: a name is empty, absolute or leads out of the root, or a file is missing; names the row.
    """
    candidates = [root] if root is not None else [table.parent, *table.absolute().parent.parents[:_PARENTS_TRIED]]
    parsed: dict[str, _Name] = {}
    for row, name in enumerate(names, start=1):
        if name not in parsed:
            parsed[name] = _parsed(table, row, name)
    found_root, dropped = _root_of(list(parsed.values())[:_NAMES_TRIED], candidates)
    real_root = Path(os.path.realpath(found_root))
    folders: dict[Path, Path] = {}
    found: dict[str, Path] = {}
    missing: list[str] = []
    for row, name in enumerate(names, start=1):
        if name in found:
            continue
        path = parsed[name].under(found_root, dropped)
        real = _real_path(path, folders)
        if not real.is_relative_to(real_root):
            raise DataError(
                f"{table}, row {row}: {name} is outside {found_root}, and nothing is read from there; name the "
                "folder that holds all files with --root"
            )
        if not real.is_file():
            missing.append(f"row {row}: {path}")
        found[name] = real
    if missing:
        raise DataError(
            f"{table}: {len(missing)} of {len(found)} files are missing, the first in {missing[0]}; "
            "name the folder that the table's paths count from with --root"
        )
    notes: tuple[str, ...] = ()
    if dropped:
        example = next(name for name, where in parsed.items() if where.windows_root)
        left_out = "/".join(parsed[example].parts[:dropped])
        notes = (f"the paths are of a Windows machine; {found_root} was taken for {left_out!r} there",)
    return FoundFiles(tuple(found[name] for name in names), found_root, notes)


@dataclass(frozen=True)
class _Name:
    """A path of a table: its parts, and whether it counts from the root of a Windows drive or of this machine."""

    parts: tuple[str, ...]
    windows_root: bool = False
    absolute: bool = False

    def under(self, root: Path, dropped: int) -> Path:
        if self.absolute:
            return Path("/", *self.parts)
        return root.joinpath(*self.parts[dropped if self.windows_root else 0 :])


def _parsed(table: Path, row: int, name: str) -> _Name:
    windows_root = bool(re.match(r"[A-Za-z]:[\\/]|\\\\", name))
    parts = tuple(part for part in re.split(r"[\\/]", _WINDOWS_ROOT.sub("", name)) if part not in ("", "."))
    if not parts or "\0" in name or len(name) > _MAX_NAME or any(len(part.encode()) > _MAX_PART for part in parts):
        raise DataError(f"{table}, row {row}: {name[:60]!r} is no file name")
    if ".." in parts:
        raise DataError(
            f"{table}, row {row}: {name} goes up with '..', which is not followed; write the paths as they count from "
            "one folder and name it with --root"
        )
    return _Name(parts, windows_root, absolute=not windows_root and name.startswith("/"))


def _root_of(names: Sequence[_Name], candidates: Sequence[Path]) -> tuple[Path, int]:
    """The first candidate that has one of the files, and how many leading folders of Windows paths it stands for."""
    deepest = max((len(name.parts) for name in names if name.windows_root), default=1)
    for candidate in candidates:
        for dropped in range(deepest):
            for name in names:
                if dropped and (not name.windows_root or dropped >= len(name.parts)):
                    continue
                path = name.under(candidate, dropped)
                if path.is_relative_to(candidate.absolute() if name.absolute else candidate) and path.is_file():
                    return candidate, dropped
    return candidates[0], 0


def _real_path(path: Path, folders: dict[Path, Path]) -> Path:
    """`path` without symbolic links; a folder is looked at once, since tables name thousands of files in each."""
    parent = folders.get(path.parent)
    if parent is None:
        parent = folders[path.parent] = Path(os.path.realpath(path.parent))
    real = parent / path.name
    try:
        is_link = stat.S_ISLNK(real.lstat().st_mode)
    except OSError:
        return real
    return Path(os.path.realpath(real)) if is_link else real
