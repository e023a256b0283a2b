"""Nothing of a run stays behind, whatever its end: a small process that outlives the driver and clears up after it.

The driver starts it before Ray and holds the other end of its standard input. When that ends, because the driver is
done or because it was killed, the guardian ends every process that carries the session's mark in its environment and
removes the session's folder. Ray's processes and their workers inherit the mark; nothing else has it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

MARK = "STUDYTOOL_SESSION"
"""The environment variable whose value, the name of the session's folder, tells its processes."""
PREFIX = "studytool-"
_LOCK = "driver.lock"
_PATIENCE_SECONDS = 30.0


@contextmanager
def guarded_folder() -> Iterator[Path]:
    """A private temporary folder for Ray; it is gone afterwards, and so is every process started under its `mark`.

    What drivers left behind that were killed together with their guardians is cleared up first.
    """
    clear_up_after_the_dead()
    # Ray puts sockets below this folder and allows their paths 107 characters, so it has to be short; it is private.
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    # Locked before it has its name: a folder whose `driver.lock` can be locked has lost its driver.
    with (folder / "locking").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "locking").rename(folder / _LOCK)
        guardian = subprocess.Popen(
            [sys.executable, "-I", __file__, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            yield folder
        finally:
            assert guardian.stdin is not None
            guardian.stdin.close()
            guardian.wait()


@contextmanager
def mark(folder: Path) -> Iterator[None]:
    """Processes that are started meanwhile belong to the session of `folder`."""
    os.environ[MARK] = folder.name
    try:
        yield
    finally:
        del os.environ[MARK]


def end_helpers(folder: Path, *, but: Collection[str]) -> None:
    """End the children of this process that belong to the session of `folder`, except the programs named `but`."""
    for process in psutil.Process().children():
        with suppress(psutil.Error, OSError):  # it has ended by itself
            if process.name() not in but and _has_mark(process, folder.name):
                process.kill()


def clear_up_after_the_dead() -> None:
    """End the processes and remove the folders of this user's sessions whose driver is gone."""
    for lock in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{_LOCK}"):
        try:
            if lock.stat().st_uid != os.getuid():
                continue
            with lock.open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # its driver is alive, or somebody else has cleared up just now
        clear_up(lock.parent)


def clear_up(folder: Path) -> None:
    """End every process of the session of `folder`, then remove the folder."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    # Until none is found twice: a process may be starting another one while it is looked for.
    quiet = 0
    while quiet < 2 and time.monotonic() < deadline:
        found = _processes_of(folder)
        for process in found:
            try:
                process.kill()
            except psutil.Error:
                continue  # it has ended by itself
        quiet = 0 if found else quiet + 1
        time.sleep(0.1)
    shutil.rmtree(folder, ignore_errors=True)


def _processes_of(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            ended = process.status() == psutil.STATUS_ZOMBIE
            is_other = not ended and process.pid != os.getpid()
            if is_other and (_has_mark(process, folder.name) or _is_ray_with_files_in(process, folder)):
                found.append(process)
        except (psutil.Error, OSError):
            continue  # another user's, or ended meanwhile
    return found


def _has_mark(process: psutil.Process, name: str) -> bool:
    environment = Path(f"/proc/{process.pid}/environ")
    if environment.exists():
        # Ray's processes write their title over the beginning of it, at which psutil stops reading.
        return f"{MARK}={name}".encode() in environment.read_bytes().split(b"\0")
    return process.environ().get(MARK) == name


def _is_ray_with_files_in(process: psutil.Process, folder: Path) -> bool:
    """Whether a process has a name of Ray's and an open file in the session's folder: its title may hide its mark."""
    if not process.name().startswith("ray"):
        return False
    for entry in Path(f"/proc/{process.pid}/fd").glob("*"):
        with suppress(OSError):  # closed meanwhile
            if entry.readlink().is_relative_to(folder):
                return True
    return False


def _wait_and_clear_up(folder: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while sys.stdin.buffer.read(1):
        pass
    clear_up(folder)


if __name__ == "__main__":
    _wait_and_clear_up(Path(sys.argv[1]))
