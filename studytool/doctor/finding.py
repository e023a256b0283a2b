"""What `studytool doctor` says: one line for each thing it looked at."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["ok", "warn", "fail"]
GB = 1e9
LEAST_DISK = 2 * GB
ENOUGH_DISK = 20 * GB
"""Of a machine that trains: checkpoints, copies of the data and Ray's own files."""
CLOCK_TOLERANCE_SECONDS = 5.0
SET_CLOCK = "set it: `timedatectl set-ntp on`"


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, what was found and, unless it is ok, what to do."""

    state: State
    what: str
    found: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.state:<4}  {self.what:<13} {self.found}" + (f"; {self.mend}" if self.mend else "")


def room_finding(what: str, folder: Path, mend: str) -> Finding:
    """Whether the disk of `folder` has room for a study."""
    free = shutil.disk_usage(folder).free
    state: State = "ok" if free >= ENOUGH_DISK else "warn" if free >= LEAST_DISK else "fail"
    return Finding(state, what, f"{folder}: {free / GB:.0f} GB free", "" if state == "ok" else mend)


def first_line(error: object) -> str:
    """What an exception says, on one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
