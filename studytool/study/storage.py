"""A study's folder at an address, such as s3://BUCKET/studies/NAME, with a working copy of it on every machine.

The driver and each worker write to a folder of this machine as always, then push whole files. What is at the address is
the study; a working copy is made anew from it when a study is taken up. A push waits for the end of an outage. Only who
holds the lease, `.lease.json`, which it renews, writes the ledger.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import logging
import os
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from studytool.data.cachefolder import cache_folder
from studytool.errors import DataError, StudytoolError
from studytool.remote import RemoteFolder, open_remote

LEASE = ".lease.json"
LEASE_SECONDS = 60.0
"""A driver that has not renewed its lease for so long is gone."""
RENEW_SECONDS = 15.0
OUTAGE_SECONDS = 3600.0
"""How long a push waits for its server."""
_OF_THIS_MACHINE = ("mlflow", "single")
"""Folders of the working copy that never go to the address: this machine's MLflow, and what `studytool train` made."""
_LONGEST_PAUSE_SECONDS = 30.0
CHECKPOINTS = ("last.pt*",)
HEAVY = (*CHECKPOINTS, "*.safetensors", "*.npz")
"""What a driver does not need to go on."""
_MOST_LEASE_BYTES = 4096

_log = logging.getLogger(__name__)


def trial_workplace(address: str, trial_id: str) -> Path:
    """The folder of this machine in which a worker trains a trial of the study at `address`."""
    return cache_folder("trials") / hashlib.sha256(address.encode()).hexdigest()[:16] / trial_id


class Storage:
    """The study's folder at `address`, and its working copy `folder`.

    What was refused is written after `before_retry`, which raises if it must not be any more, or OSError as a write.
    """

    def __init__(self, address: str, folder: Path, *, before_retry: Callable[[], None] = lambda: None) -> None:
        self.address = address
        self.folder = folder
        self._before_retry = before_retry
        self._remote: RemoteFolder = open_remote(address)
        self._pushed: dict[str, tuple[int, int]] = {}

    def pull(self, *, without: Sequence[str] = ()) -> None:
        """Make the working copy what is at the address, but for files whose names match `without`."""
        there = {name: file for name, file in self._remote.files().items() if name != LEASE}
        for path in [path for path in self.folder.rglob("*") if path.is_file()]:
            name = path.relative_to(self.folder).as_posix()
            if name not in there and not path.name.startswith(".") and name.split("/")[0] not in _OF_THIS_MACHINE:
                path.unlink()
        for name, file in there.items():
            path = self.folder / name
            if path.name.startswith(".") or _matches(path.name, without):
                continue
            if path.is_file() and (path.stat().st_size, path.stat().st_mtime_ns) == (file.bytes, file.written_ns):
                continue
            self._remote.fetch(name, path)
            os.utime(path, ns=(file.written_ns, file.written_ns))

    def fetch(self, name: str) -> None:
        """Copy one file from the address into the working copy, if it is there."""
        if self._remote.files(name.rpartition("/")[0]).get(name):
            self._remote.fetch(name, self.folder / name)

    def push(self, *names: str) -> None:
        """Copy files of the working copy to the address, in this order, those that have not changed left out.

        Raises:
            OSError: the server has not answered for `OUTAGE_SECONDS`.
        """
        for name in names:
            path = self.folder / name
            if not path.is_file():
                continue
            state = path.stat()
            version = (state.st_ino, state.st_mtime_ns)
            if self._pushed.get(name) != version:
                self._patiently(lambda path=path, name=name: self._remote.put(path, name), name)  # type: ignore[misc]
                self._pushed[name] = version

    def push_all(self) -> None:
        """Copy to the address what the working copy has beside the trials."""
        paths = [path for path in self.folder.rglob("*") if path.is_file()]
        names = [path.relative_to(self.folder).as_posix() for path in paths if not path.name.startswith(".")]
        self.push(*(name for name in sorted(names) if name.split("/")[0] not in ("trials", *_OF_THIS_MACHINE)))

    def remove(self, below: str, patterns: Iterable[str]) -> None:
        """Remove from the address what is in the folder `below` and matches."""
        for name in self._remote.files(below):
            if _matches(name.rpartition("/")[2], patterns):
                self._patiently(lambda name=name: self._remote.remove(name), name)  # type: ignore[misc]

    def _patiently(self, call: Callable[[], None], name: str) -> None:
        """Call until it works, with growing pauses."""
        begun, pause, is_retry = time.monotonic(), 0.5, False
        while True:
            try:
                if is_retry:
                    self._before_retry()
                return call()
            except OSError as error:
                if time.monotonic() - begun > OUTAGE_SECONDS or isinstance(error, FileNotFoundError):
                    raise
                line = str(error).splitlines()[0][:200]
                _log.warning("%s/%s: %s; trying again in %.0f s", self.address, name, line, pause)
                time.sleep(pause)
                pause, is_retry = min(2 * pause, _LONGEST_PAUSE_SECONDS), True


class Lease:
    """The right to write a study's ledger at an address; held by one driver, renewed until it is closed.

    Raises:
        StudytoolError: another driver holds it and renews it.
        DataError: the server does not answer.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._remote = open_remote(address)
        self._mine = json.dumps({"driver": this_driver(), "id": uuid.uuid4().hex})
        self._taken_by: str | None = None
        self._closed = threading.Event()
        self._wait_for_the_dead()
        self._write()
        time.sleep(2.0)  # two that begin in the same second: the later one has it
        self._look()
        self.check()
        self._thread = threading.Thread(target=self._renew, name="studytool-lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise StudytoolError if another driver has taken the study over, as after a long outage."""
        if self._taken_by is not None:
            raise _runs_elsewhere(self._address, self._taken_by)

    def look_and_check(self) -> None:
        """The same after a fresh look at the lease (OSError: the server does not answer)."""
        try:
            self._look()
        except DataError as error:
            raise OSError(str(error)) from error
        self.check()

    def close(self) -> None:
        """Let another driver have the study."""
        self._closed.set()
        self._thread.join(timeout=5)
        if self._taken_by is None:
            try:
                self._look()
                if self._taken_by is None:
                    self._remote.remove(LEASE)
            except (OSError, DataError):
                _log.warning("%s/%s could not be removed; it ends by itself", self._address, LEASE)

    def _wait_for_the_dead(self) -> None:
        """Return when nobody holds the lease, or its holder has not renewed it for long enough."""
        if LEASE in self._remote.files():
            wait_until_gone(self._address, _holder(self._remote), lambda: self._remote.files().get(LEASE))

    def _renew(self) -> None:
        while not self._closed.wait(RENEW_SECONDS):
            try:
                self._look()
                if self._taken_by is not None:
                    return
                self._write()
            except (OSError, DataError) as error:
                _log.warning("%s: the lease could not be renewed: %s", self._address, error)

    def _look(self) -> None:
        content = _content(self._remote)
        if content and content != self._mine:
            self._taken_by = _holder(self._remote)

    def _write(self) -> None:
        with tempfile.TemporaryDirectory(prefix="lease-") as folder:
            path = Path(folder) / LEASE
            path.write_text(self._mine, encoding="utf-8")
            self._remote.put(path, LEASE)


def wait_until_gone(where: object, driver: str, sign: Callable[[], object]) -> None:
    """Return when a driver that was not closed has given no new `sign` of life for long enough, or took it away.

    Raises:
        StudytoolError: it is alive: the sign has changed.
    """
    _log.warning("%s: its last driver (%s) was not closed; waiting until it is surely gone", where, driver)
    first, begun = sign(), time.monotonic()
    while time.monotonic() < begun + LEASE_SECONDS:
        time.sleep(min(1.0, RENEW_SECONDS))
        now = sign()
        if now is None:
            return
        if now != first:
            raise _runs_elsewhere(where, driver)


def _runs_elsewhere(where: object, driver: str) -> StudytoolError:
    return StudytoolError(f"{where}: this study is running in another process ({driver}); one of them is enough")


def this_driver() -> str:
    """What others are told of the driver that this process is."""
    return f"{socket.gethostname()}, process {os.getpid()}"


def holder_of(address: str) -> tuple[str, float] | None:
    """Which driver holds the study at the address, and how many seconds ago it last said so; None if none does."""
    remote = open_remote(address)
    lease = remote.files().get(LEASE)
    return None if lease is None else (_holder(remote), time.time() - lease.written_ns / 1e9)


def fresh_workplace(address: str, trial_id: str) -> Storage:
    """A worker's place for a trial, with what the address has of it."""
    workplace = trial_workplace(address, trial_id)
    shutil.rmtree(workplace, ignore_errors=True)
    workplace.mkdir(parents=True)
    storage = Storage(f"{address}/trials/{trial_id}", workplace)
    storage.pull()
    return storage


def _content(remote: RemoteFolder) -> str:
    if LEASE not in remote.files():
        return ""
    return remote.read(LEASE, most_bytes=_MOST_LEASE_BYTES).decode("utf-8", "replace")


def _holder(remote: RemoteFolder) -> str:
    try:
        return str(json.loads(_content(remote))["driver"])
    except (ValueError, LookupError, TypeError):
        return "unknown"


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
