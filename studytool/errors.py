"""The errors a user can meet: each message is one line that says what was found, what is allowed and what to do."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable


class StudytoolError(Exception):
    """Something the user can mend; the command line prints it as one line and exits with 1."""


class SpecError(StudytoolError):
    """A study file, or a `--set` override, that cannot be run."""


class DataError(StudytoolError):
    """A dataset, volume or table that cannot be used."""


class DamagedError(DataError):
    """Files of a dataset that are missing, or not what its manifest says: `names`."""

    def __init__(self, message: str, names: Iterable[str]) -> None:
        super().__init__(message)
        self.names = tuple(names)


class WeightsError(StudytoolError):
    """Pre-trained weights or a checkpoint that are missing, damaged or do not fit."""


class TrainingError(StudytoolError):
    """A training run that cannot go on, such as a loss that is no longer finite."""


class DiskFullError(StudytoolError, OSError):
    """No space left where a file was to be written; what was there before is whole."""

    def __init__(self, place: object) -> None:
        super().__init__(
            f"{place}: no space left on the disk; free some and give the same command again, "
            "it goes on where it stopped"
        )
        self.errno = errno.ENOSPC


def unknown_name(kind: str, found: object, known: Iterable[str]) -> str:
    """Say that a name is unknown, with the nearest known ones or, if none is near, all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(str(found), names, n=2, cutoff=0.6)
    if near:
        return f"unknown {kind} {found!r}; did you mean {' or '.join(map(repr, near))}?"
    return f"unknown {kind} {found!r}; known: {', '.join(names)}"
