from __future__ import annotations

import json
import math
from dataclasses import replace

from studytool.results import (
    Cost,
    DeviceInfo,
    EpochResult,
    Outcome,
    Scores,
    TrialRecord,
    epoch_from_dict,
    to_dict,
    trial_from_dict,
)

SCORES = Scores(4, 0.5, 0.75, 0.7, 0.6, None, ((1, 1), (0, 2)))
EPOCH = EpochResult(1, 3, 0.9, 1e-3, SCORES, Cost(1, 2, 3, 4, 10, 5, 6, 7, None), 1, 0.7, SCORES, True)
RECORD = TrialRecord(
    "a.search-000",
    "a",
    "search",
    0,
    None,
    1,
    {"augment": ["turns"]},
    "hash",
    Outcome.COMPLETE,
    (EPOCH,),
    "",
    DeviceInfo("cpu", "x", 2),
)


def test_records_survive_json():
    assert epoch_from_dict(json.loads(json.dumps(to_dict(EPOCH)))) == EPOCH
    assert trial_from_dict(json.loads(json.dumps(to_dict(RECORD)))) == RECORD


def test_costs_add_up_except_for_peaks_and_what_was_not_measured():
    total = Cost(1, 2, 3, 4, 10, 5, 6, 7, None) + Cost(1, 1, 1, 1, 4, 1, 1, 2, 8.0)
    assert total == Cost(2, 3, 4, 5, 14, 6, 7, 7, None)
    assert (Cost() + Cost(1, energy_joules=2.0) + Cost(1, energy_joules=3.0)).energy_joules == 5
    assert (Cost() + Cost()).energy_joules is None
    assert total.seconds == 14


def test_metric_by_name():
    assert SCORES.metric("val/balanced_accuracy") == 0.7
    assert math.isnan(SCORES.metric("val/macro_auc"))


def test_the_cost_without_the_cache():
    plain = Cost(train_seconds=8, evaluate_seconds=2, device_seconds=5)
    assert plain.device_seconds_without_cache == 5
    # Two of ten seconds filled the cache; what was read from it would have taken eight.
    filling = Cost(train_seconds=8, evaluate_seconds=2, device_seconds=5, cache_fill_seconds=2, cache_saved_seconds=8)
    reading = Cost(train_seconds=7, evaluate_seconds=1, device_seconds=4, cache_saved_seconds=8)
    assert filling.device_seconds_without_cache == 5 * 16 / 10
    assert reading.device_seconds_without_cache == 4 * 16 / 8
    broken = replace(RECORD, epochs=(replace(EPOCH, cost=filling),), lost_device_seconds=100)
    assert broken.cost_with_lost.device_seconds_without_cache == 100 + 5 * 16 / 10


def test_what_a_trial_used_since_is_what_adds_up_to_its_cost():
    earlier = Cost(train_seconds=2.0, device_seconds=1.0, samples=3, flops=4.0, peak_memory_gib=1.5, energy_joules=5.0)
    cost = Cost(train_seconds=6.0, device_seconds=3.0, samples=9, flops=8.0, peak_memory_gib=2.0, energy_joules=7.0)
    since = Cost(train_seconds=4.0, device_seconds=2.0, samples=6, flops=4.0, peak_memory_gib=2.0, energy_joules=2.0)
    assert cost.since(earlier) == since
    assert earlier + since == cost
    assert cost.since(Cost()) == cost
