"""A sign of life of a study's driver, for machines that cannot see its lock: a small file that it keeps touching."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from studytool.errors import DataError
from studytool.files import write_text
from studytool.study.storage import LEASE_SECONDS, RENEW_SECONDS, holder_of, this_driver, wait_until_gone

DRIVER = ".driver"


@dataclass(frozen=True)
class SignOfLife:
    """Which driver has a study ("HOST, process N"), and how many seconds ago it last said so."""

    driver: str
    seconds_ago: float

    @property
    def is_fresh(self) -> bool:
        """Whether the driver can still be there."""
        return self.seconds_ago < LEASE_SECONDS


class Heartbeat:
    """Keeps the file `.driver` of a study's folder fresh until it is closed; without it a study runs as well."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / DRIVER
        self._closed = threading.Event()
        with suppress(OSError):
            write_text(self._path, this_driver())
        self._thread = threading.Thread(target=self._beat, name="studytool-heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """The driver has put everything in order."""
        self._closed.set()
        self._thread.join()
        with suppress(OSError):
            if self._path.read_text(encoding="utf-8") == this_driver():
                self._path.unlink()

    def _beat(self) -> None:
        while not self._closed.wait(RENEW_SECONDS):
            with suppress(OSError):
                self._path.touch()


def wait_for_another(folder: Path) -> None:
    """Return when no driver on another machine has the study in a shared folder, whose lock may end at its machine.

    Raises:
        StudytoolError: one has, and says so.
    """
    sign = last_sign(folder, None)
    if sign is not None and sign.is_fresh and _host(sign.driver) != _host(this_driver()):
        wait_until_gone(folder, sign.driver, lambda: _beat_of(folder))


def _beat_of(folder: Path) -> int | None:
    with suppress(OSError):
        return (folder / DRIVER).stat().st_mtime_ns
    return None


def _host(driver: str) -> str:
    return driver.partition(", process")[0]


def last_sign(folder: Path, address: str | None) -> SignOfLife | None:
    """The last sign of life of the driver of a study in a folder, or at an address; None if it said that it is done."""
    if address is not None:
        with suppress(OSError, DataError):
            held = holder_of(address)
            return held and SignOfLife(*held)
        return None
    try:
        path = folder / DRIVER
        return SignOfLife(path.read_text(encoding="utf-8"), time.time() - path.stat().st_mtime)
    except (OSError, ValueError):
        return None
