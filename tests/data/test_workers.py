from __future__ import annotations

import multiprocessing
import os
import pickle
import time

import pytest

from studytool.data.workers import results_in_order, shared_slots, usable_cores
from studytool.errors import DataError


def squared(number):
    return number**2


def refuses_seven(number):
    if number == 7:
        raise DataError("seven")
    return number


def dies_in_a_process(number):
    if multiprocessing.parent_process() is not None:
        os._exit(3)
    time.sleep(0.01)  # this process works itself until the others have started


def test_in_this_process_nothing_is_done_before_it_is_asked_for():
    done = []
    results = results_in_order(done.append, range(10), workers=1, chunk=3)
    next(results)
    next(results)
    assert done == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_results_come_in_order(chunk):
    assert list(results_in_order(squared, range(3, 14), workers=2, chunk=chunk)) == [n**2 for n in range(3, 14)]
    assert multiprocessing.active_children() == []


@pytest.mark.slow
@pytest.mark.parametrize(("work", "words"), [(refuses_seven, "seven"), (dies_in_a_process, "ended without a word")])
def test_what_goes_wrong_in_a_process(work, words):
    with pytest.raises(DataError, match=words):
        list(results_in_order(work, range(10_000), workers=2, chunk=2))
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [1, 3])
def test_slots_are_shared_by_name_and_leave_nothing_behind(tmp_path, workers):
    with shared_slots(tmp_path, (4, 2), "float16", workers=workers) as slots:
        others = pickle.loads(pickle.dumps(slots)) if workers > 1 else slots
        for number in range(2 * workers + 1):
            others[number][:] = number
        assert [int(slots[number][3, 1]) for number in range(2 * workers + 1)] == list(range(2 * workers + 1))
        assert slots[2 * workers + 1][0, 0] == 0
    assert list(tmp_path.iterdir()) == []


def test_usable_cores():
    assert 1 <= usable_cores() <= os.cpu_count()
