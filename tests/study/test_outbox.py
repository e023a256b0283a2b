from __future__ import annotations

import threading
import time

import pytest

from studytool.errors import StudytoolError
from studytool.study.tracking import outbox as outbox_module
from studytool.study.tracking.outbox import Outbox, Problem


class AwayError(Exception):
    pass


class OddError(Exception):
    pass


MEANING = {AwayError: Problem.AWAY, OddError: Problem.DOUBTFUL, StudytoolError: Problem.WRONG}


def judge(error: Exception) -> Problem | None:
    return MEANING.get(type(error))


class Store:
    """Keeps what is delivered; raises `error` as long as there is one."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.tries = 0
        self.kept: list[int] = []

    def keep(self, number: int) -> int:
        self.tries += 1
        if self.error is not None:
            raise self.error
        self.kept.append(number)
        return number


@pytest.fixture
def store():
    return Store()


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def outbox(warnings, monkeypatch):
    monkeypatch.setattr(outbox_module, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(outbox_module, "LONGEST_PAUSE_SECONDS", 0.004)
    box = Outbox(judge, warnings.append)
    yield box
    if box._thread.is_alive():
        box.close(1)


def until(happened) -> None:
    for _ in range(5000):
        if happened():
            return
        time.sleep(0.001)
    raise AssertionError("it never happened")


def test_records_are_delivered_once_and_in_order(outbox, store, warnings):
    for number in range(200):
        outbox.put(f"record {number}", lambda n=number: store.keep(n))
    assert outbox.close(10) == 0
    assert store.kept == list(range(200))
    assert warnings == []


def test_put_does_not_wait_for_a_store_that_hangs(outbox, store):
    free = threading.Event()
    outbox.put("slow", free.wait)
    for number in range(10):
        outbox.put("record", lambda n=number: store.keep(n))
    assert store.kept == []
    free.set()
    assert outbox.close(10) == 0
    assert store.kept == list(range(10))


def test_what_waits_while_the_store_is_away_comes_in_order_afterwards_and_one_warning_tells(outbox, store, warnings):
    store.error = AwayError("connection refused\nwith a long story")
    for number in range(5):
        outbox.put("record", lambda n=number: store.keep(n))
    until(lambda: store.tries > 10)
    store.error = None
    assert outbox.close(10) == 0
    assert store.kept == [0, 1, 2, 3, 4]
    assert len(warnings) == 1
    assert "connection refused" in warnings[0]
    assert "\n" not in warnings[0]


def test_ask_returns_the_answer_or_raises_what_the_store_refused(outbox, store):
    assert outbox.ask("record", lambda: store.keep(7), timeout_seconds=10) == 7
    store.error = StudytoolError("no such run")
    with pytest.raises(StudytoolError, match="no such run"):
        outbox.ask("record", lambda: store.keep(8), timeout_seconds=10)


def test_ask_does_not_wait_for_a_store_that_is_away_but_is_delivered_later(outbox, store):
    store.error = AwayError()
    outbox.put("record", lambda: store.keep(1))
    until(lambda: outbox.away)
    begun = time.monotonic()
    assert outbox.ask("record", lambda: store.keep(2), timeout_seconds=60) is None
    assert time.monotonic() - begun < 30
    store.error = None
    assert outbox.close(10) == 0
    assert store.kept == [1, 2]
    assert not outbox.away


def test_a_refused_record_is_left_out_with_a_warning_and_counted(outbox, store, warnings):
    store.error = StudytoolError("learning_rate has changed")
    outbox.put("trial 3", lambda: store.keep(3))
    until(lambda: store.tries == 1)
    store.error = None
    outbox.put("trial 4", lambda: store.keep(4))
    assert outbox.close(10) == 1
    assert store.kept == [4]
    assert warnings == ["MLflow: trial 3 could not be written: learning_rate has changed"]


def test_a_record_that_is_refused_after_its_asker_went_away_is_warned_of(outbox, store, warnings):
    store.error = AwayError("gone")
    outbox.put("record", lambda: store.keep(1))
    until(lambda: outbox.away)
    assert outbox.ask("trial 9", lambda: store.keep(2), timeout_seconds=60) is None
    store.error = StudytoolError("not like this")
    assert outbox.close(10) == 2
    assert [line for line in warnings if "trial 9" in line and "not like this" in line]


def test_a_doubtful_record_is_given_up_after_some_tries_and_the_next_ones_go_on(outbox, store, warnings):
    store.error = OddError("internal error")
    outbox.put("trial 5", lambda: store.keep(5))
    until(lambda: warnings)
    assert store.tries == outbox_module.TRIES_IF_DOUBTFUL + 1
    store.error = None
    outbox.put("trial 6", lambda: store.keep(6))
    assert outbox.close(10) == 1
    assert store.kept == [6]


def test_a_defect_of_the_program_is_raised_at_the_next_call(outbox, store):
    outbox.put("record", lambda: {}["missing"])
    outbox._thread.join(10)
    with pytest.raises(KeyError, match="missing"):
        outbox.put("record", lambda: store.keep(1))
    with pytest.raises(KeyError, match="missing"):
        outbox.close(1)


def test_close_gives_up_in_time_and_counts_what_is_left(outbox, store):
    store.error = AwayError()
    for number in range(4):
        outbox.put("record", lambda n=number: store.keep(n))
    assert outbox.close(0.05) == 4
    assert not outbox._thread.is_alive()


def test_records_that_can_be_filled_in_later_do_not_pile_up_without_end(outbox, store, monkeypatch):
    monkeypatch.setattr(outbox_module, "CAPACITY", 3)
    free = threading.Event()
    outbox.put("slow", free.wait)
    until(lambda: outbox._queue.qsize() == 0)
    for number in range(10):
        outbox.put("epoch", lambda n=number: store.keep(n), can_be_filled_in=True)
    outbox.put("end", lambda: store.keep(99))
    free.set()
    assert outbox.close(10) == 7
    assert store.kept == [0, 1, 2, 99]
