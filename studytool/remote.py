"""Files at an address such as s3://bucket/folder, read and written through pyarrow's file systems, or fsspec's."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from studytool.errors import DamagedError, DataError
from studytool.files import whole_file

RETRY_AFTER_SECONDS = (0.5, 2.0, 8.0, 30.0)
"""Pauses before a file is asked for again after its server failed; each new byte starts the list anew."""
_WHOLE_OBJECTS = ("s3", "gcs", "abfs")
"""File systems in which a file is seen when it has been written to its end, and not before."""
_PIECE_BYTES = 8 * 1024 * 1024

Result = TypeVar("Result")


def is_remote(address: str) -> bool:
    """Whether an address names a file system, as opposed to a path on this machine."""
    return "://" in address


@dataclass(frozen=True)
class RemoteFile:
    """How large a file at an address is, and when it was written by the clock of its server (ns; what S3 tells: s)."""

    bytes: int
    written_ns: int


@dataclass(frozen=True)
class RemoteFolder:
    """A folder at an address; names are relative to it."""

    address: str
    _filesystem: Any
    _path: str

    def read(self, name: str, *, most_bytes: int) -> bytes:
        """The content of a small file.

        Raises:
            DataError: it is not there, too large, or its server cannot be reached.
        """
        size = self.size(name)
        if size > most_bytes:
            raise DataError(f"{self.address}/{name}: {size} bytes; at most {most_bytes} can be right")
        with self._speaking(name):
            return bytes(_retried(lambda: self._open(name).read()))

    def size(self, name: str) -> int:
        """Bytes of a file (DataError if there is none)."""
        with self._speaking(name):
            info = _retried(lambda: self._filesystem.get_file_info(f"{self._path}/{name}"))
        if not info.is_file:
            raise DataError(f"{self.address}/{name}: there is no such file")
        return int(info.size)

    def names(self, folder: str) -> tuple[str, ...]:
        """The names of the files in a folder below, sorted; none if there is no such folder."""
        import pyarrow.fs

        selector = pyarrow.fs.FileSelector(f"{self._path}/{folder}", allow_not_found=True)
        with self._speaking(folder):
            found = _retried(lambda: self._filesystem.get_file_info(selector))
        return tuple(sorted(info.base_name for info in found if info.is_file))

    def fetch(self, name: str, target: Path, *, sha256: str | None = None) -> None:
        """Copy a file to `target`, whole or not at all; an outage is waited out.

        Raises:
            DamagedError: the file is not there, or its digest is not `sha256`.
            DataError: its server cannot be reached for longer than the pauses.
        """
        digest = hashlib.sha256()
        done = 0
        with self._speaking(name), whole_file(target) as temporary, temporary.open("wb") as out:

            def more() -> bool:
                nonlocal done
                with self._open(name) as source:
                    source.seek(done)
                    while piece := source.read(_PIECE_BYTES):
                        out.write(piece)
                        digest.update(piece)
                        done += len(piece)
                return True

            _retried(more, progress=lambda: done)
            if sha256 not in (None, found := digest.hexdigest()):
                raise DamagedError(
                    f"{self.address}/{name}: its SHA-256 is {found[:12]}…, it should be {sha256[:12]}…; "
                    "copy it to its address again",
                    [name],
                )

    def files(self, folder: str = "") -> dict[str, RemoteFile]:
        """Every file below a folder, by its name relative to this one."""
        import pyarrow.fs

        base = f"{self._path}/{folder}".rstrip("/")
        selector = pyarrow.fs.FileSelector(base, recursive=True, allow_not_found=True)
        with self._speaking(folder):
            found = _retried(lambda: self._filesystem.get_file_info(selector))
        return {
            info.path.removeprefix(f"{self._path}/"): RemoteFile(int(info.size), int(info.mtime_ns))
            for info in found
            if info.is_file
        }

    def put(self, source: Path, name: str) -> None:
        """Copy a file of this machine to `name`, whole or not at all.

        Raises:
            OSError: the server cannot be reached, or does not let us.
        """
        import pyarrow.fs

        target = f"{self._path}/{name}"
        if self._filesystem.type_name in _WHOLE_OBJECTS:
            pyarrow.fs.copy_files(str(source), target, destination_filesystem=self._filesystem)
            return
        self._filesystem.create_dir(target.rsplit("/", 1)[0], recursive=True)
        pyarrow.fs.copy_files(str(source), f"{target}.part", destination_filesystem=self._filesystem)
        self._filesystem.move(f"{target}.part", target)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there (OSError: as for `put`)."""
        with suppress(FileNotFoundError):
            self._filesystem.delete_file(f"{self._path}/{name}")

    def _open(self, name: str) -> Any:
        return self._filesystem.open_input_file(f"{self._path}/{name}")

    @contextmanager
    def _speaking(self, name: str) -> Iterator[None]:
        """Errors of the file system as one line with the address."""
        try:
            yield
        except FileNotFoundError as error:
            raise DamagedError(f"{self.address}/{name}: there is no such file", [name]) from error
        except _outages() as error:
            if _is_local(error):
                raise
            raise DataError(f"{self.address}/{name}: cannot be read: {_first_line(error)}") from error
        except ValueError as error:  # fsspec's word for a web server that cannot send part of a file
            raise DataError(f"{self.address}/{name}: cannot be read in parts: {_first_line(error)}") from error


def open_remote(address: str) -> RemoteFolder:
    """The folder at `address`: s3://, gs://, abfs://, hdfs:// or file:// through pyarrow, others through fsspec.

    Keys come from the environment or the usual files of each service, never from the address; AWS_ENDPOINT_URL names
    another S3 server.

    Raises:
        DataError: no such kind of address, a package for it is missing, or the server does not answer.
    """
    import pyarrow
    from pyarrow import fs

    if "@" in address.split("://", 1)[1].split("/", 1)[0]:
        kind = address.split("://", 1)[0]
        raise DataError(f"{kind}://…: an address may not hold a key; put keys into the environment instead")
    try:
        filesystem, path = fs.FileSystem.from_uri(address)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError):
        filesystem, path = _through_fsspec(address)
    except OSError as error:
        raise DataError(f"{address}: {_first_line(error)}") from error
    return RemoteFolder(address.rstrip("/"), filesystem, path.rstrip("/"))


def _through_fsspec(address: str) -> tuple[Any, str]:
    import fsspec
    from pyarrow import fs

    try:
        filesystem, path = fsspec.core.url_to_fs(address)
    except (ValueError, ImportError) as error:
        raise DataError(f"{address}: {_first_line(error)}") from error
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path


def _retried(ask: Callable[[], Result], progress: Callable[[], int] = lambda: 0) -> Result:
    """What `ask` gives, asked again after pauses when the server fails; the pauses begin anew after any progress."""
    failures, reached = 0, progress()
    while True:
        try:
            return ask()
        except FileNotFoundError:
            raise
        except _outages() as error:
            if _is_local(error):
                raise
            failures = 0 if progress() > reached else failures
            reached = progress()
            if failures == len(RETRY_AFTER_SECONDS):
                raise
            time.sleep(RETRY_AFTER_SECONDS[failures])
            failures += 1


def _outages() -> tuple[type[Exception], ...]:
    """What a server that fails raises: aiohttp, which fsspec uses for http, has errors that are no OSError."""
    aiohttp = sys.modules.get("aiohttp")
    return (OSError,) if aiohttp is None else (OSError, aiohttp.ClientError)


def _is_local(error: Exception) -> bool:
    """Whether it is about a file of this machine: no room, no right to write."""
    return isinstance(error, OSError) and error.filename is not None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
