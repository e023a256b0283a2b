from __future__ import annotations

import pytest
from torch import nn

from studytool.training.normalization import follow_statistics


@pytest.mark.parametrize(
    ("own", "steps", "expected"),
    [(0.001, 1000, 0.1), (0.1, 1000, 0.1), (0.1, 15, 0.2), (0.1, 1, 0.3), (0.5, 7, 0.5), (None, 7, None)],
)
def test_the_statistics_reach_back_a_third_of_an_epoch(own: float | None, steps: int, expected: float | None) -> None:
    network = nn.Sequential(nn.Conv3d(1, 2, 1), nn.Sequential(nn.BatchNorm3d(2, momentum=own)), nn.BatchNorm1d(2))
    network[2].momentum = own
    follow_statistics(network, steps)
    assert network[1][0].momentum == network[2].momentum
    assert network[2].momentum == (None if expected is None else pytest.approx(expected))


def test_other_layers_are_left_alone() -> None:
    network = nn.LayerNorm(3)
    follow_statistics(network, 7)
    assert not hasattr(network, "momentum")
