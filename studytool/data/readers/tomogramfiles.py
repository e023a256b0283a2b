"""The file that a table means by the name of a tomogram."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from studytool.errors import DataError, unknown_name

_ENDINGS = (".mrc", ".rec", ".map", ".mrcs", ".tomostar", ".st", ".ali")
_FILE_ENDINGS = (".mrc", ".rec", ".map")
_COMPRESSED = (".gz", ".bz2")
_NAMED = 3


@dataclass(frozen=True)
class FoundTomograms:
    """The file of each name of the table, and what the user should be told of how it was found."""

    files: dict[str, Path]
    notes: tuple[str, ...]


def find_tomograms(place: Path, names: Sequence[str], table: Path, root: Path | None) -> FoundTomograms:
    """Find the file of every name, in the folder `place` or as the file `place`.

    A name means the file of that name, else the one whose name begins with it, else the one that contains it, the
    rest being set off by a character that is neither letter nor digit: "TS_01" means TS_01_10.00Apx.mrc and not
    TS_011.mrc. Folders and endings (.mrc, .tomostar, …) in the table do not count. "" is a name if there is a single
    file.

    Raises:
        DataError: a name has no file or several, two names have the same one, or a link leads out of `root` (`place`
            if None).
    """
    if place.is_file():
        if len(names) > 1:
            raise DataError(
                f"{table}: names {len(names)} tomograms ({_some(names)}), --tomograms names one file; name their folder"
            )
        return FoundTomograms(dict.fromkeys(names, place), ())
    if not place.is_dir():
        raise DataError(f"{place}: the tomograms are not there")
    files = _listed(place, root)
    if not files:
        raise DataError(f"{place}: no tomograms ({', '.join(_FILE_ENDINGS)}, plain or as .gz, .bz2) in this folder")
    found = {name: _file_of(name, files, place, table) for name in names}
    taken: dict[Path, str] = {}
    for name, file in found.items():
        other = taken.setdefault(file, name)
        if other != name:
            raise DataError(
                f"{table}: the tomograms {other!r} and {name!r} both mean {file}; name the files as the table does"
            )
    guessed = [f"{name} is {file.name}" for name, file in found.items() if _key(name) != stem_of(file.name)]
    if not guessed:
        return FoundTomograms(found, ())
    return FoundTomograms(found, (f"tomograms found by a part of their file names: {_some(guessed)}",))


def stem_of(name: str) -> str:
    """A file's name without its ending; the name itself if it has none of a tomogram."""
    return _without(name, _FILE_ENDINGS)


def require_inside(path: Path, real_root: Path) -> None:
    """Refuse what lies, or links, outside of a folder whose own path has no links.

    Raises:
        DataError: it does; --root would allow it.
    """
    if not Path(os.path.realpath(path)).is_relative_to(real_root):
        raise DataError(
            f"{path}: lies outside of {real_root}, and nothing is read from there; name the folder that holds all "
            "files with --root"
        )


def _listed(folder: Path, root: Path | None) -> list[Path]:
    real_root = Path(os.path.realpath(root or folder))
    files = []
    for file in sorted(folder.iterdir()):
        if file.name.startswith(".") or stem_of(file.name) == file.name or not file.is_file():
            continue
        if file.is_symlink():
            require_inside(file, real_root)
        files.append(file)
    return files


def _file_of(name: str, files: Sequence[Path], place: Path, table: Path) -> Path:
    key = _key(name)
    if not key:
        if len(files) == 1:
            return files[0]
        raise DataError(f"{table}: names no tomogram, and {place} holds {len(files)}; add a column tomogram")
    word = re.escape(key)
    for pattern in (word, word + r"[\W_].*", r"(?:.*[\W_])?" + word + r"(?:[\W_].*)?"):
        fitting = [file for file in files if re.fullmatch(pattern, stem_of(file.name), re.DOTALL)]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise DataError(
                f"{table}: the tomogram {name!r} may be any of {len(fitting)} files in {place}: "
                f"{_some([file.name for file in fitting])}; leave one of them there, or name it in the table as it is"
            )
    known = [stem_of(file.name) for file in files]
    raise DataError(f"{table}: {place} has no file for it: {unknown_name('tomogram', key, known)}")


def _key(name: str) -> str:
    """The name without folders, of Windows too, and without an ending that marks a tomogram or tilt series."""
    return _without(re.split(r"[\\/]", name.strip())[-1], _ENDINGS)


def _without(name: str, endings: Sequence[str]) -> str:
    plain = next((name[: -len(end)] for end in _COMPRESSED if name.lower().endswith(end)), name)
    return next((plain[: -len(end)] for end in endings if plain.lower().endswith(end)), name)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
