from __future__ import annotations

import itertools

import numpy as np
import pytest

from studytool.data.labels import draw

LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [40, 100, 7]))


def fraction(value: float, seed: int = 1) -> set[int]:
    return set(draw(LABELS, per_class=None, fraction=value, seed=seed).tolist())


def shots(count: int, seed: int = 1) -> set[int]:
    return set(draw(LABELS, per_class=count, fraction=1.0, seed=seed).tolist())


def per_class(rows: set[int]) -> list[int]:
    return np.bincount(LABELS[sorted(rows)], minlength=3).tolist()


def test_all_labels_are_all_rows_in_their_order():
    assert np.array_equal(draw(LABELS, per_class=None, fraction=1.0, seed=3), np.arange(len(LABELS)))


def test_every_class_gives_the_same_fraction_and_at_least_one():
    assert per_class(fraction(0.25)) == [10, 25, 2]
    assert per_class(fraction(0.05)) == [2, 5, 1]
    assert per_class(fraction(0.001)) == [1, 1, 1]


def test_so_many_of_each_class():
    assert per_class(shots(3)) == [3, 3, 3]
    assert per_class(shots(7)) == [7, 7, 7]


@pytest.mark.parametrize("seed", range(5))
def test_smaller_draws_lie_within_larger_ones(seed: int):
    for draws in ([shots(n, seed) for n in range(1, 8)], [fraction(f, seed) for f in (0.01, 0.05, 0.25, 0.5, 1.0)]):
        assert all(small <= large for small, large in itertools.pairwise(draws))
    assert shots(2, seed) <= fraction(0.3, seed), "both are the first ones of the same order"


def test_it_is_a_pure_function_and_rises():
    np.random.seed(0)  # noqa: NPY002
    first = draw(LABELS, per_class=5, fraction=1.0, seed=4)
    np.random.seed(1)  # noqa: NPY002
    assert np.array_equal(draw(LABELS.copy(), per_class=5, fraction=1.0, seed=4), first)
    assert (np.diff(first) > 0).all()
    assert shots(5, seed=4) != shots(5, seed=5)


def test_each_row_is_drawn_as_often_as_another():
    times = np.zeros(len(LABELS))
    for seed in range(400):
        times[sorted(fraction(0.25, seed))] += 1
    for label, share in ((0, 10 / 40), (1, 25 / 100), (2, 2 / 7)):
        expected, deviation = 400 * share, np.sqrt(400 * share * (1 - share))
        assert np.abs(times[label == LABELS] - expected).max() < 4.5 * deviation


def test_a_class_is_drawn_whatever_the_others_are():
    without_last = LABELS[LABELS != 2]
    kept = np.flatnonzero(LABELS != 2)
    rows = kept[draw(without_last, per_class=4, fraction=1.0, seed=2)]
    assert set(rows.tolist()) == {row for row in shots(4, seed=2) if LABELS[row] != 2}


def test_classes_have_orders_of_their_own():
    twice = np.repeat([0, 1], 50)
    rows = draw(twice, per_class=10, fraction=1.0, seed=0)
    assert rows[:10].tolist() != (rows[10:] - 50).tolist()


def test_more_than_there_are():
    with pytest.raises(ValueError, match="8 of label 2, which has 7"):
        shots(8)
