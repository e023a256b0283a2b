"""The folder on this machine for what can be made or fetched again: bounded, and shared by all processes.

STUDYTOOL_CACHE/KIND/NAME/         one entry: whatever it holds is whole
STUDYTOOL_CACHE/KIND/NAME.lock     held by the process that is making it
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from studytool.errors import DataError

CACHE_GB = 100.0
"""What the entries of one kind may take in all, unless STUDYTOOL_CACHE_GB says otherwise."""


def cache_folder(kind: str) -> Path:
    """The folder of one kind of entries ("datasets", "features"): below `STUDYTOOL_CACHE`, else ~/.cache/studytool."""
    chosen = os.environ.get("STUDYTOOL_CACHE")
    folder = (Path(chosen) if chosen else Path.home() / ".cache" / "studytool") / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def bound_bytes() -> float:
    """What the entries of one kind may take (DataError: STUDYTOOL_CACHE_GB is no number above 0)."""
    chosen = os.environ.get("STUDYTOOL_CACHE_GB", str(CACHE_GB))
    try:
        bound = float(chosen)
    except ValueError:
        bound = 0.0
    if not bound > 0:
        raise DataError(f"STUDYTOOL_CACHE_GB is {chosen!r}; it has to be a number above 0, in GB")
    return bound * 1e9


def make_room(root: Path, keep: Path, needed_bytes: float) -> None:
    """Remove the entries used longest ago until `needed_bytes` for `keep` fit; what is mapped stays readable.

    An entry that a process is making just now is left alone.
    """
    others = sorted(
        (other for other in root.iterdir() if other.is_dir() and other != keep), key=lambda f: f.stat().st_mtime
    )
    sizes = {
        other: sum(file.stat().st_size for file in other.rglob("*") if file.is_file() and not file.is_symlink())
        for other in others
    }
    for other in others:
        if needed_bytes + sum(sizes.values()) <= bound_bytes():
            return
        with locked(other, wait=False) as free:
            if free:
                shutil.rmtree(other, ignore_errors=True)
                sizes.pop(other)


@contextmanager
def locked(entry: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of an entry; without `wait`, yield whether it was free. It ends with the process."""
    name = entry.name.removeprefix(".").removesuffix(".partial")  # what is being written has its entry's lock
    with entry.with_name(f"{name}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
