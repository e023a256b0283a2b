"""Ctrl-C, SIGTERM, SIGUSR1 and a closed terminal end a run in good order; a second signal ends it at once."""

from __future__ import annotations

import os
import signal
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn

SIGNAL_EXIT_CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 75, "SIGHUP": 129}
"""75 asks batch systems that announce a time limit by SIGUSR1 to queue the job again; SIGHUP: the terminal is gone."""
LAST_SECONDS = 14.0
"""After a signal the process is gone within so long, even if something it waits for does not answer."""
_SAME_SECONDS = 0.5
"""The same signal again within so long is the first one: `timeout` sends it to its child and to the whole group."""


class EndedBySignal(BaseException):
    """Raised in the main thread by the first signal; no `except Exception` on the way takes it for an error."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    @property
    def exit_code(self) -> int:
        """What the process exits with."""
        return SIGNAL_EXIT_CODES[self.name]


class Signals:
    """While it is entered the first signal raises `EndedBySignal`; the next one leaves the process with one line.

    The ledger and the checkpoints are whole at every moment, and the guardian ends what is left of Ray, so that
    leaving at once loses nothing but the epochs since the last checkpoints.
    """

    def __init__(self, last_seconds: float = LAST_SECONDS) -> None:
        self._last_seconds = last_seconds
        self.caught: str | None = None
        """The signal that has come."""
        self._came = 0.0
        self._previous: dict[int, Any] = {}
        self._last_call: threading.Timer | None = None

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.getsignal(number) for number in _numbers()}
            if self._previous[signal.SIGHUP] == signal.SIG_IGN:
                del self._previous[signal.SIGHUP]  # `nohup`: the study goes on without its terminal
            self.watch()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._last_call is not None:
            self._last_call.cancel()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if error is not None and self.caught and not isinstance(error, EndedBySignal):
            raise EndedBySignal(self.caught) from error  # Ray's compiled parts make another error of it

    def watch(self) -> None:
        """Put the handlers in place; to be called again where Ray may have put its own there.

        Raises:
            EndedBySignal: again, if the first time somebody on the way has kept it to himself.
        """
        if self.caught:
            raise EndedBySignal(self.caught)
        for number in self._previous:
            if signal.getsignal(number) != self._handle:
                signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        code, now = SIGNAL_EXIT_CODES[name], time.monotonic()
        if self.caught == name and now - self._came < _SAME_SECONDS:
            return
        if self.caught is not None:
            _leave(code, f"stopped at once by a second signal, {name}")
        self.caught, self._came = name, now
        if name == "SIGHUP":
            _write_nowhere()
        words = f"ended by {name}; what it waited for did not answer within {self._last_seconds:g} s"
        self._last_call = threading.Timer(self._last_seconds, _leave, [code, words])
        self._last_call.daemon = True
        self._last_call.start()
        raise EndedBySignal(name)


@contextmanager
def sheltered() -> Iterator[None]:
    """Processes that are started meanwhile do not hear what ends a run: Ctrl-C and `timeout` mean their whole group.

    The driver has to end them itself, by SIGKILL; a signal that comes meanwhile reaches this thread afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _numbers())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _write_nowhere() -> None:
    """Nobody reads what is written to a closed terminal, and the attempt would be an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        if stat.S_ISCHR(os.fstat(stream).st_mode):  # a closed terminal no longer says that it is one
            os.dup2(nowhere, stream)


def _leave(code: int, words: str) -> NoReturn:
    # Not by `print`: the signal may have come in the middle of one.
    with suppress(OSError):
        os.write(2, f"studytool: {words}\n".encode())
    os._exit(code)


def _numbers() -> list[signal.Signals]:
    return [signal.Signals[name] for name in SIGNAL_EXIT_CODES]
