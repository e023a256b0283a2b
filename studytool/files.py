"""Files that are either whole or not there: written under a temporary name, flushed to disk, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from studytool.errors import DiskFullError


@contextmanager
def whole_file(path: Path, *, over: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is fsynced and renamed to `path`, on error removed.

    It is empty, or what the file `over` was, which is given up: to write over its bytes (open it with "r+b", and
    truncate it in the end) is faster than to have the kernel find memory and blocks for new ones.

    Raises:
        DiskFullError: there is no space left for it, whatever the writer made of that.
        IsADirectoryError: `path` is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    with disk_full_explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    if over is not None and over.exists():
        over.replace(temporary)
    with disk_full_explained(path):
        yield from _written(temporary, path)


def _written(temporary: Path, path: Path) -> Iterator[Path]:
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def disk_full_explained(path: Path) -> Iterator[None]:
    """Turn what libraries raise when there is no space left for `path` into a DiskFullError."""
    try:
        yield
    except Exception as error:
        if _says_disk_full(error, path.parent):
            raise DiskFullError(path) from error
        raise


_FULL = (errno.ENOSPC, errno.EDQUOT)
_FEW_BLOCKS = 16


def _says_disk_full(error: Exception, folder: Path) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    if any(f"os error {number}" in str(error) or os.strerror(number) in str(error) for number in _FULL):
        return True  # safetensors and Arrow
    # torch only says that a write failed, or that the file is shorter than it should be
    return "PytorchStreamWriter" in str(error) or (
        isinstance(error, RuntimeError) and os.statvfs(folder).f_bavail < _FEW_BLOCKS
    )


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all; NaN and infinity are refused (ValueError)."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_with_sha256(path: Path) -> tuple[bytes, str]:
    """A file's bytes and their SHA-256, in one read, so that both are of the same file if it is being replaced."""
    content = path.read_bytes()
    return content, hashlib.sha256(content).hexdigest()


def _umask() -> int:
    current = os.umask(0o077)
    os.umask(current)
    return current


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
