from __future__ import annotations

from dataclasses import replace

import pytest

from studytool.results import Cost, DeviceInfo, EpochResult, Scores
from studytool.training.cost import cost_to_target, samples_per_second, share_of_peak

SCORES = Scores(1, 0.5, 1.0, 1.0, 1.0, 1.0, ((1,),))


def curve(values: list[float], sign: int = 1) -> list[EpochResult]:
    epochs: list[EpochResult] = []
    for epoch, value in enumerate(values, start=1):
        best = max(values[:epoch], key=lambda v: sign * v)
        cost = Cost(train_seconds=10.0 * epoch, samples=100 * epoch)
        epochs.append(EpochResult(epoch, epoch, 0.1, 0.1, SCORES, cost, values.index(best) + 1, best))
        del value
    return epochs


def test_the_cost_is_that_of_the_first_epoch_at_the_target():
    cost, reached = cost_to_target(curve([0.2, 0.6, 0.5, 0.9]), 0.6, 1)
    assert reached
    assert cost.train_seconds == 20.0


def test_a_loss_reaches_its_target_from_above():
    cost, reached = cost_to_target(curve([2.0, 1.0, 0.4, 0.7], sign=-1), 0.5, -1)
    assert reached
    assert cost.samples == 300


def test_a_trial_that_never_reaches_it_is_censored_with_its_whole_cost():
    cost, reached = cost_to_target(curve([0.2, 0.3]), 0.31, 1)
    assert not reached
    assert cost.train_seconds == 20.0
    assert cost_to_target([], 0.5, 1) == (Cost(), False)


def test_what_comes_after_the_last_epoch_is_no_part_of_reaching_the_target():
    epochs = curve([0.2, 0.6])
    last = Cost(train_seconds=8.0, evaluate_seconds=2.0, device_seconds=5.0, ending_device_seconds=1.0)
    last = replace(last, cache_saved_seconds=20.0)
    cost, reached = cost_to_target([epochs[0], replace(epochs[1], cost=last)], 0.6, 1)
    assert reached
    assert cost.device_seconds == pytest.approx(4)
    assert cost.device_seconds_without_cache == pytest.approx(4 + 20 / 2)


def test_throughput_leaves_the_first_epoch_out():
    epochs = curve([0.1, 0.2, 0.3])
    slow = Cost(train_seconds=epochs[0].cost.train_seconds - 9.0, samples=100)
    # Epoch 1 took 1 s here, the others 10 s more each than it should: only they count.
    epochs[0] = EpochResult(1, 1, 0.1, 0.1, SCORES, slow, 1, 0.1)
    assert samples_per_second(epochs[1:]) == 10.0
    assert samples_per_second(epochs[:1]) is None


def test_the_share_of_the_peak_counts_all_seconds_of_the_trial():
    cost = Cost(train_seconds=3.0, data_seconds=1.0, flops=2e12)
    assert share_of_peak(cost, DeviceInfo("cpu", "a test's", peak_flops=1e12)) == 0.5
    assert share_of_peak(cost, DeviceInfo("cpu", "a test's")) is None
    assert share_of_peak(Cost(), DeviceInfo("cpu", "a test's", peak_flops=1e12)) is None
