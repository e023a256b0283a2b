from __future__ import annotations

import itertools

import numpy as np
import pytest

from studytool.data.assign import assign_groups

WEIGHTS = [1e6, 1e4, 1e4]
FRACTIONS = [0.6, 0.2, 0.2]


def sums(counts: np.ndarray, part: np.ndarray, parts: int = 3) -> list[list[int]]:
    return [counts[part == p].sum(axis=0).tolist() for p in range(parts)]


def cost(counts, part, wanted):
    """The chi-square distance from the wanted counts, written down once more."""
    target = np.outer(wanted, counts.sum(axis=0))
    return ((np.array(sums(counts, part, len(wanted))) - target) ** 2 / target).sum()


def test_equal_groups_are_dealt_out_exactly():
    counts = np.full((10, 4), 7)
    part = assign_groups(counts, FRACTIONS, WEIGHTS, seed=0)
    assert sums(counts, part) == [[42] * 4, [14] * 4, [14] * 4]


def test_few_groups_are_assigned_in_the_best_of_all_ways():
    counts = np.random.default_rng(3).integers(1, 30, size=(7, 2))
    part = assign_groups(counts, FRACTIONS, WEIGHTS, seed=1)
    whole = [np.array(way) for way in itertools.product(range(3), repeat=7) if len(set(way)) == 3]
    assert cost(counts, part, FRACTIONS) == pytest.approx(min(cost(counts, way, FRACTIONS) for way in whole))


@pytest.mark.parametrize("seed", range(4))
def test_more_groups_are_assigned_in_the_best_way_too(seed):
    """Eleven groups, of which all 177,147 ways are looked at here: moves and exchanges find the best of them."""
    counts = np.random.default_rng(seed).integers(5, 40, size=(11, 2))
    ways = np.array(list(itertools.product(range(3), repeat=11)))
    all_sums = np.stack([(ways == p).astype(float) @ counts for p in range(3)], axis=1)
    target = np.outer(FRACTIONS, counts.sum(axis=0))
    least = ((all_sums - target) ** 2 / target).sum(axis=(1, 2)).min()
    assert cost(counts, assign_groups(counts, FRACTIONS, WEIGHTS, seed=0), FRACTIONS) == pytest.approx(least)


def test_many_groups_come_near():
    """200 uneven groups: each class within 1% of what is wanted, and no single move would help."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(0.5, 40, size=(200, 5))) + 1
    part = assign_groups(counts, FRACTIONS, WEIGHTS, seed=0)
    shares = np.array(sums(counts, part)) / counts.sum(axis=0)
    assert np.abs(shares - np.array(FRACTIONS)[:, None]).max() < 0.01
    found = cost(counts, part, FRACTIONS)
    for group, to in itertools.product(range(200), range(3)):
        moved = part.copy()
        moved[group] = to
        assert cost(counts, moved, FRACTIONS) > found - 1e-6


@pytest.mark.parametrize("others", [6, 20])
def test_every_part_has_every_class_where_that_can_be(others):
    """The rare class stands in three large groups, of which train alone would take two for the common one's sake."""
    counts = np.array([[300, 2]] * 3 + [[200 // others, 0]] * others)
    for seed in range(3):
        part = assign_groups(counts, FRACTIONS, WEIGHTS, seed=seed)
        assert sorted(part[:3].tolist()) == [0, 1, 2]
        careless = assign_groups(counts, FRACTIONS, [0, 0, 0], seed=seed)
        assert sorted(careless[:3].tolist()) != [0, 1, 2]


def test_a_class_in_one_group_is_for_training():
    counts = np.array([[10, 0]] * 8 + [[10, 4]])
    assert assign_groups(counts, FRACTIONS, WEIGHTS, seed=0)[8] == 0


def test_single_volumes_are_cut_class_by_class():
    classes = np.repeat([0, 1, 2], [1000, 10, 3])
    counts = np.eye(3, dtype=np.int64)[classes]
    part = assign_groups(counts, FRACTIONS, WEIGHTS, seed=0)
    assert sums(counts, part) == [[600, 6, 1], [200, 2, 1], [200, 2, 1]]
    assert part.tolist() != sorted(part.tolist())
    other = assign_groups(counts, FRACTIONS, WEIGHTS, seed=1)
    assert sums(counts, other) == sums(counts, part)
    assert part.tolist() != other.tolist()


def test_a_single_volume_of_a_class_is_for_training():
    """Even where train is the smallest part; two are for train and the larger of the others."""
    counts = np.eye(3, dtype=np.int64)[np.repeat([0, 1, 2], [50, 1, 2])]
    part = assign_groups(counts, [0.1, 0.5, 0.3, 0.1], [*WEIGHTS, 0], seed=0)
    assert sums(counts, part, 4) == [[5, 1, 1], [25, 0, 1], [15, 0, 0], [5, 0, 0]]


def test_the_seed_decides_between_equally_good_ways():
    counts = np.full((10, 2), 5)
    first = assign_groups(counts, FRACTIONS, WEIGHTS, seed=4)
    assert first.tolist() == assign_groups(counts, FRACTIONS, WEIGHTS, seed=4).tolist()
    assert len({tuple(assign_groups(counts, FRACTIONS, WEIGHTS, seed=seed).tolist()) for seed in range(8)}) > 4
