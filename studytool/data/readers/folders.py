"""MRC volumes whose labels stand beside them: a folder with one folder per class, or a CSV `path,label[,tomogram]`."""

from __future__ import annotations

import csv
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from studytool.data.readers.mrc import expander, read_mrc
from studytool.data.readers.mrcstack import count_volumes, read_volume_of_stack
from studytool.data.readers.source import NO_TOMOGRAM_NOTE, Entry, Listing, ReadOptions, ReadVolume
from studytool.errors import DataError

_ENDINGS = (".mrc", ".map", ".rec")
_COMPRESSED = (".gz", ".bz2")
_HEADER_BYTES = 1024
_DELIMITERS = (",", ";", "\t")


class MrcFiles(Listing):
    """A source of one MRC file per particle; the path of each is its entry's `where`."""

    def read(self, entry: Entry) -> ReadVolume:
        """Read the volume of one entry.

        Raises:
            DataError: see `read_mrc`.
        """
        mrc = read_mrc(entry.where)
        return ReadVolume(mrc.volume_DHW, mrc.voxel_size_angstrom)


class MrcStack(Listing):
    """A source of the volumes in one MRC file; the file and the number of each, from 1, are its entry's `where`."""

    def read(self, entry: Entry) -> ReadVolume:
        """Read the volume of one entry.

        Raises:
            DataError: see `read_volume_of_stack`.
        """
        mrc = read_volume_of_stack(*entry.where)
        return ReadVolume(mrc.volume_DHW, mrc.voxel_size_angstrom)


def recognize(path: Path, options: ReadOptions) -> MrcFiles | MrcStack | None:
    """A folder with a folder of MRC files per class, one of MRC files if `options.label` is given, or a CSV.

    One MRC file alone is read with `options.label`, too: a volume, or a stack of them. The files of a folder are taken
    by their ending or, without a known one, by their content. The label is the folder's name as it is.

    Raises:
        DataError: an MRC file alone without a label, folders within class folders, a file that lies elsewhere, or a row
            of the CSV that cannot be used.
    """
    if options.coordinates is not None or options.tomograms is not None:
        return None
    if path.is_dir():
        return _classes(path, options)
    if _has_mrc_header(path):
        return _one_file(path, options)
    columns = _csv_columns(path, options)
    return None if columns is None else _table(path, options, columns)


def _one_file(path: Path, options: ReadOptions) -> MrcFiles | MrcStack:
    if options.label is None:
        raise DataError(
            f"{path}: an MRC file alone, of which no class is known; give it with --label or, if it is a tomogram, the "
            "particles' positions with --coordinates"
        )
    name, label, notes = _without_ending(path.name), options.label, (NO_TOMOGRAM_NOTE,)
    with path.open("rb") as file:
        compressed = expander(file.read(3)) is not None
    count = 1 if compressed else count_volumes(path)
    if count == 1:
        return MrcFiles("MRC file", (Entry(name, label, "", path, str(path)),), notes, {"path": str(path)})
    numbers = range(1, count + 1)
    entries = tuple(Entry(f"{name}-{n:06d}", label, "", (path, n), f"{n}@{path}") for n in numbers)
    return MrcStack("MRC stack of volumes", entries, notes, {"path": str(path)})


def _classes(root: Path, options: ReadOptions) -> MrcFiles | None:
    real_root = Path(os.path.realpath(options.root or root))
    entries: list[Entry] = []
    other_files: list[str] = []
    for folder in _shown(root):
        if folder.is_dir():
            found, others = _one_class(root, folder, real_root)
            entries += found
            other_files += others
    loose = [file for file in _shown(root) if file.is_file() and _is_mrc(file)]
    provenance = {"path": str(root)}
    if loose and not entries and options.label is not None:
        found = [_entry(root, file, options.label, real_root) for file in loose]
        return MrcFiles("folder of MRC files", tuple(found), (NO_TOMOGRAM_NOTE,), provenance)
    if not entries:
        return None
    notes = [NO_TOMOGRAM_NOTE]
    if other_files:
        notes.append(f"{len(other_files)} files that are no MRC files are left out, the first {other_files[0]}")
    if loose:
        notes.append(f"{len(loose)} MRC files directly in {root} belong to no class and are left out")
    return MrcFiles("folder with a folder of MRC files per class", tuple(entries), tuple(notes), provenance)


def _one_class(root: Path, folder: os.DirEntry[str], real_root: Path) -> tuple[list[Entry], list[str]]:
    """The entries of a class folder, and the files in it that are none."""
    _check_inside(folder, real_root)
    listed = _shown(Path(folder.path))
    files = [item for item in listed if not item.is_dir()]
    volumes = [file for file in files if _is_mrc(file)]
    for deeper in (item for item in listed if item.is_dir()):
        if any(file.is_file() and _is_mrc(file) for file in _shown(Path(deeper.path))):
            raise DataError(
                f"{deeper.path}: MRC files two folders below {root}; which of the two names the class cannot be told: "
                "import a CSV with the columns path,label,tomogram instead"
            )
    taken = {file.name for file in volumes}
    others = [file.path for file in files if file.name not in taken]
    return [_entry(root, file, folder.name, real_root) for file in volumes], others


def _entry(root: Path, file: os.DirEntry[str], label: str, real_root: Path) -> Entry:
    _check_inside(file, real_root)
    path = Path(file.path)
    return Entry(_without_ending(path.relative_to(root).as_posix()), label, "", path, str(path))


def _check_inside(item: os.DirEntry[str], real_root: Path) -> None:
    if not item.is_symlink():
        return
    target = Path(os.path.realpath(item.path))
    if not target.is_relative_to(real_root):
        raise DataError(
            f"{item.path}: a link to {target}, outside {real_root}; nothing is read from there: name the folder that "
            "holds all files with --root"
        )


def _shown(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder lists, sorted by name, without hidden things."""
    with os.scandir(folder) as listing:
        return sorted((e for e in listing if not e.name.startswith((".", "__MACOSX"))), key=lambda e: e.name)


def _is_mrc(file: os.DirEntry[str]) -> bool:
    return _without_ending(file.name) != file.name or _has_mrc_header(Path(file.path))


def _without_ending(name: str) -> str:
    plain = name
    for compressed in _COMPRESSED:
        if plain.lower().endswith(compressed):
            plain = plain[: -len(compressed)]
            break
    for ending in _ENDINGS:
        if plain.lower().endswith(ending):
            return plain[: -len(ending)]
    return name


def _has_mrc_header(path: Path) -> bool:
    """Whether the file, expanded if it is compressed, carries the id of MRC at its place."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            head = file.read(_HEADER_BYTES)
            file.seek(0)
            expand = expander(head)
            if expand is not None:
                with expand(file) as expanded:
                    head = expanded.read(_HEADER_BYTES)
    except (OSError, EOFError, zlib.error):
        return False
    return head[208:211] == b"MAP"


@dataclass(frozen=True)
class _Columns:
    names: tuple[str, ...]
    delimiter: str
    label: int | None
    tomogram: int | None


def _csv_columns(path: Path, options: ReadOptions) -> _Columns | None:
    """The columns of a CSV with a column `path`; None where the file is not one."""
    from studytool.data.readers.tables import column_named, head_of_text

    lines = head_of_text(path)
    if not lines:
        return None
    delimiter = max(_DELIMITERS, key=lines[0].count)
    names = [name.strip() for name in next(csv.reader([lines[0]], delimiter=delimiter), [])]
    if "path" not in names:
        return None

    def index(asked: str | None, usual: str, kind: str) -> int | None:
        if asked is None:
            return names.index(usual) if usual in names else None
        return names.index(column_named(path, asked, names, kind))

    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise DataError(f"{path}: the column {repeated[0]!r} stands there {names.count(repeated[0])} times; keep one")
    label = index(options.label_column, "label", "label column")
    tomogram = index(options.group_column, "tomogram", "group column")
    return _Columns(tuple(names), delimiter, label, tomogram)


def _table(path: Path, options: ReadOptions, columns: _Columns) -> MrcFiles:
    from studytool.data.readers.tables import locate_files, require_unique

    rows = list(_rows(path, columns))
    if not rows:
        raise DataError(f"{path}: no rows under the header")
    place = columns.names.index("path")
    names = [row[place] for row in rows]
    found = locate_files(path, names, options.root or path.absolute().parent)
    require_unique(path, [str(file) for file in found.paths])
    entries = []
    for number, (row, file) in enumerate(zip(rows, found.paths, strict=True), start=1):
        label = options.label if options.label is not None else "" if columns.label is None else row[columns.label]
        tomogram = "" if columns.tomogram is None else row[columns.tomogram]
        name = _without_ending(row[place].replace("\\", "/"))
        entries.append(Entry(name, label, tomogram, file, f"{file} ({path}, row {number})"))
    used = {place, columns.label, columns.tomogram}
    ignored = [name for index, name in enumerate(columns.names) if index not in used]
    notes = [*found.notes]
    if columns.tomogram is None:
        notes.append(NO_TOMOGRAM_NOTE)
    if ignored:
        notes.append(f"the columns {', '.join(ignored)} are not used")
    return MrcFiles("CSV of paths and labels", tuple(entries), tuple(notes), {"path": str(path)})


def _rows(path: Path, columns: _Columns) -> Iterator[list[str]]:
    from studytool.data.readers.tables import lines_of_text

    lines = (line for _, line in lines_of_text(path) if line)
    try:
        for number, row in enumerate(csv.reader(lines, delimiter=columns.delimiter, strict=True)):
            if len(row) != len(columns.names):
                raise DataError(
                    f"{path}, row {number}: {len(row)} values, the header names {len(columns.names)}: "
                    f"{', '.join(columns.names)}"
                )
            if number:
                yield [value.strip() for value in row]
    except csv.Error as error:
        raise DataError(f"{path}: not a CSV that can be read: {error}") from error
