from __future__ import annotations

import numpy as np
import pytest

from studytool.report.features import balanced_draw, describe_features


def clusters(distance: float) -> tuple[np.ndarray, np.ndarray]:
    """Three clouds of 12 points in 6 dimensions, so far apart."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 12)
    centres = distance * np.eye(6)[:3]
    return centres[labels] + rng.standard_normal((36, 6)), labels


def test_classes_that_lie_apart_score_high_and_mixed_ones_low():
    features, labels = clusters(20.0)
    apart = describe_features(features, labels)
    assert apart.rand_index == 1.0
    assert apart.neighbour_accuracy == 1.0
    assert apart.silhouette > 0.3  # half of the six features are noise
    mixed = describe_features(*clusters(0.0))
    assert mixed.rand_index < 0.3
    assert mixed.neighbour_accuracy < 0.7
    assert mixed.silhouette < 0.1


def test_the_map_is_the_same_each_time_and_keeps_neighbours():
    features, labels = clusters(20.0)
    first, second = describe_features(features, labels), describe_features(features, labels)
    np.testing.assert_array_equal(first.places, second.places)
    assert first.places.shape == (36, 2)
    distances = np.linalg.norm(first.places[:, None] - first.places[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    assert (labels[distances.argmin(axis=1)] == labels).all()


def test_features_that_do_not_vary_say_nothing():
    flat = describe_features(np.ones((12, 4)), np.repeat([0, 1], 6))
    assert (flat.silhouette, flat.rand_index) == (0.0, 0.0)
    with pytest.raises(ValueError, match="too few"):
        describe_features(np.ones((4, 4)), np.array([0, 0, 1, 1]))


def test_a_draw_takes_equally_many_of_each_class_and_no_more_than_asked():
    labels = np.array([0] * 50 + [1] * 3 + [2] * 50)
    rows = np.arange(1, 103)
    drawn = balanced_draw(labels, rows, 30, 0)
    assert sorted(drawn) == drawn.tolist()
    assert np.bincount(labels[drawn]).tolist() == [10, 3, 10]
    np.testing.assert_array_equal(drawn, balanced_draw(labels, rows, 30, 0))
