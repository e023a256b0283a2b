"""A queue between the study and a store that may be slow or away: records are delivered in order by one thread.

Knows nothing of what it delivers: a record is a function that can be called again until it succeeds.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from enum import Enum
from typing import Any

from studytool.errors import StudytoolError

CAPACITY = 20_000
"""Records that may wait; beyond it those that can be filled in later are left out."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.25, 10.0
TRIES_IF_DOUBTFUL = 6


class Problem(Enum):
    """What a failed delivery means: the store is AWAY, the record is WRONG, or it is DOUBTFUL which."""

    AWAY = "away"
    DOUBTFUL = "doubtful"
    WRONG = "wrong"


@dataclass
class _Record:
    what: str
    deliver: Callable[[], Any]
    answer: Future[Any] | None = None


class Outbox:
    """Delivers records in the order they were put, and tries again for as long as the store is away.

    Args:
        judge: what an exception of a delivery means; None for one that is no matter of the store (a defect of the
            program), which is raised again at the next call.
        warn: told one line when the store goes away, and for the first record that is refused.
    """

    def __init__(self, judge: Callable[[Exception], Problem | None], warn: Callable[[str], None]) -> None:
        self._judge = judge
        self._warn = warn
        self._queue: queue.Queue[_Record | None] = queue.Queue()
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._defect: Exception | None = None
        self._refused = 0
        self._undelivered = 0
        self._left_out = 0
        self.away = False
        self._thread = threading.Thread(target=self._run, name="studytool-outbox", daemon=True)
        self._thread.start()

    def put(self, what: str, deliver: Callable[[], Any], *, can_be_filled_in: bool = False) -> None:
        """Queue a record; `what` names it in a warning. `can_be_filled_in` ones are left out when too many wait."""
        self._check()
        if can_be_filled_in and self._queue.qsize() >= CAPACITY:
            self._left_out += 1
            return
        self._queue.put(_Record(what, deliver))

    def ask(self, what: str, deliver: Callable[[], Any], *, timeout_seconds: float) -> Any:
        """Queue a record and return what its delivery returns; None if the store is away or too slow to answer.

        Raises:
            Exception: what the delivery raised, unless it means that the store is away.
        """
        record = self._promise(what, deliver)
        answer = record.answer
        assert answer is not None
        try:
            return answer.result(0.0 if self.away else timeout_seconds)
        except FutureTimeoutError:
            record.answer = None  # a later failure becomes a warning
            return answer.result() if answer.done() else None

    def promise(self, what: str, deliver: Callable[[], Any]) -> Future[Any]:
        """Queue a record; what its delivery will have returned or raised, once it was not for the store being away."""
        answer = self._promise(what, deliver).answer
        assert answer is not None
        return answer

    def _promise(self, what: str, deliver: Callable[[], Any]) -> _Record:
        self._check()
        record = _Record(what, deliver, Future())
        self._queue.put(record)
        return record

    def close(self, timeout_seconds: float) -> int:
        """Deliver what still waits, for at most so many seconds; the number of records that could not be delivered."""
        self._deadline = time.monotonic() + timeout_seconds
        self._queue.put(None)
        self._closing.set()
        self._thread.join(timeout_seconds + 1)
        self._check()
        # The thread may still hang in a call to the store, with the rest of the queue behind it.
        hanging = self._queue.qsize() if self._thread.is_alive() else 0
        return self._undelivered + self._left_out + self._refused + hanging

    def _run(self) -> None:
        while (record := self._queue.get()) is not None:
            if time.monotonic() > self._deadline:
                self._undelivered += 1
                continue
            try:
                self._deliver(record)
            except Exception as defect:  # raised again where the study calls next, see _check
                self._defect = defect
                if record.answer is not None:
                    record.answer.set_exception(defect)
                return

    def _deliver(self, record: _Record) -> None:
        pause, doubtful = FIRST_PAUSE_SECONDS, 0
        while True:
            try:
                result = record.deliver()
            except Exception as error:
                problem = self._judge(error)
                if problem is None:
                    raise
                doubtful += problem is Problem.DOUBTFUL
                if problem is Problem.WRONG or doubtful > TRIES_IF_DOUBTFUL:
                    self._refuse(record, error)
                    return
                if problem is Problem.AWAY and not self.away:
                    self.away = True
                    self._warn(f"MLflow does not answer; the study goes on and its records wait ({_one_line(error)})")
                if time.monotonic() + pause > self._deadline:
                    self._undelivered += 1
                    return
                self._pause(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            else:
                self.away = False
                if record.answer is not None:
                    record.answer.set_result(result)
                return

    def _pause(self, seconds: float) -> None:
        """Wait; the beginning of `close` cuts a long wait short, so that the last try comes within its time."""
        if self._closing.is_set():
            time.sleep(seconds)
        else:
            self._closing.wait(seconds)

    def _refuse(self, record: _Record, error: Exception) -> None:
        answer = record.answer
        if answer is not None:
            answer.set_exception(error)
            return
        self._refused += 1
        if self._refused == 1 or isinstance(error, StudytoolError):
            self._warn(f"MLflow: {record.what} could not be written: {_one_line(error)}")

    def _check(self) -> None:
        if self._defect is not None:
            raise self._defect


def _one_line(error: Exception) -> str:
    text = str(error).strip().split("\n", 1)[0] or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "…"
