"""A folder that is written under a hidden name and renamed when it is whole, by one writer at a time.

The hidden folder `.NAME.partial` beside the target is locked by its writer. The lock ends with the process, however it
ends, so that the next writer knows whether what stands there is being written or was left behind.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from studytool.errors import DataError

_LOCK = ".lock"
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


@contextmanager
def whole_folder(folder: Path, *, journal: str | None = None) -> Iterator[Path]:
    """Yield the hidden folder that becomes `folder` on success; on error it is removed.

    It is empty, unless the file `journal` is in it: then it has all that a writer before left there. That file also
    makes an interruption, or an error of the system such as a full disk, leave the folder for the next writer.

    Raises:
        DataError: `folder` exists and is not empty, or another process is writing it.
    """
    _check_free(folder)
    temporary = folder.parent / f".{folder.name}.partial"
    lock = _take_lock(temporary, folder)
    try:
        _check_free(folder)  # another writer may have finished it just before
        if journal is None or not (temporary / journal).is_file():
            empty_folder(temporary)
        yield temporary
        try:
            temporary.rename(folder)
        except OSError as error:
            raise _taken(folder) from error
        (folder / _LOCK).unlink()
    except (KeyboardInterrupt, SystemExit, OSError):
        if journal is None or not (temporary / journal).is_file():
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def empty_folder(temporary: Path) -> None:
    """Remove all that a writer before left in its hidden folder."""
    for path in temporary.iterdir():
        if path.name == _LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _take_lock(temporary: Path, folder: Path) -> int:
    """Make the hidden folder if it is not there, and lock it; the open descriptor holds the lock."""
    while True:
        temporary.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(temporary / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:
            continue  # its writer has finished or given up in between
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise DataError(
                f"{folder}: another process is writing it just now; wait for it, or choose another folder"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:
                os.close(lock)
                raise
            return lock  # a file system without locks: nobody is kept off, as nobody can be
        try:
            if os.path.samestat((temporary / _LOCK).stat(), os.fstat(lock)):
                return lock
        except FileNotFoundError:
            pass
        os.close(lock)  # locked a folder that its writer has finished or removed in between


def _check_free(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise _taken(folder)


def _taken(folder: Path) -> DataError:
    return DataError(f"{folder}: exists already; choose another folder or remove it")
