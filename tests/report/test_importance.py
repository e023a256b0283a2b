from __future__ import annotations

import numpy as np
import pytest
from fabricated_study import make_spec, make_trials

from studytool.report.importance import SearchPoint, importance, search_points
from studytool.results import Outcome

STUDY = """
name: important
data: {path: data/small}
arms: {init: [random, kinetics400]}
search:
  learning_rate: {log_uniform: [1e-4, 1e-1]}
  batch_size: {choice: [8, 16, 32]}
  trials_per_arm: 20
"""


@pytest.fixture
def spec(tmp_path):
    return make_spec(tmp_path, STUDY)


def points(value):
    rng = np.random.default_rng(0)
    made = []
    for number in range(40):
        parameters = {
            "init": ["random", "kinetics400"][number % 2],
            "learning_rate": float(10 ** rng.uniform(-4, -1)),
            "batch_size": int(rng.choice([8, 16, 32])),
        }
        made.append(SearchPoint(parameters["init"], parameters, value(parameters), Outcome.COMPLETE))
    return made


def test_what_alone_decides_has_nearly_all_the_importance(spec):
    shares = importance(spec, points(lambda p: -((np.log10(p["learning_rate"]) + 2.5) ** 2)))
    assert next(iter(shares)) == "learning_rate"
    assert shares["learning_rate"] > 0.8
    assert sum(shares.values()) == pytest.approx(1)
    shares = importance(spec, points(lambda p: float(p["init"] == "random") + 1e-3 * p["learning_rate"]))
    assert next(iter(shares)) == "init"


def test_too_few_or_equal_results_give_none(spec):
    assert importance(spec, points(lambda p: p["learning_rate"])[:5]) == {}
    assert importance(spec, points(lambda p: 0.5)) == {}


def test_points_are_the_search_trials_with_an_epoch(tmp_path):
    spec = make_spec(tmp_path)
    records = [record for _, record in make_trials(spec)]
    found = search_points(spec, records)
    assert len(found) == 12
    assert sum(p.outcome is Outcome.PRUNED for p in found) == 3
    assert set(found[0].parameters) == {"backbone", "init", "freeze", "learning_rate"}
    assert search_points(spec, [r for r in records if r.phase == "confirm"]) == []
