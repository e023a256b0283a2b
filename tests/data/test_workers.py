from __future__ import annotations

import multiprocessing
import os

import pytest

from studytool.data.workers import results_in_order, usable_cores
from studytool.errors import DataError


def squared(number):
    return number**2


def refuses_seven(number):
    if number == 7:
        raise DataError("seven")
    return number


def dies_at_seven(number):
    if number == 7:
        os._exit(3)
    return number


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
@pytest.mark.parametrize(("work", "words"), [(refuses_seven, "seven"), (dies_at_seven, "ended without a word")])
def test_what_goes_wrong_in_a_process(work, words):
    with pytest.raises(DataError, match=words):
        list(results_in_order(work, range(20), workers=2, chunk=2))
    assert multiprocessing.active_children() == []


def test_usable_cores():
    assert 1 <= usable_cores() <= os.cpu_count()
