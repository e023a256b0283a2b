from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from fabricated_study import make_spec, make_trials

from studytool.report.figures import search_slices
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


ODD = """
name: odd
data: {path: data/small}
arms: {augment: [[], [turns]], label_fraction: [1, 0.25]}
search:
  weight_decay: {choice: [0, 1.0e-4]}
  learning_rate: {log_uniform: [1e-4, 1e-1]}
  trials_per_arm: 4
"""


def test_values_that_the_ledger_spells_in_another_way_are_those_of_the_study_file(tmp_path):
    spec = make_spec(tmp_path, ODD)
    (_, done), *_ = make_trials(make_spec(tmp_path))
    records = []
    for arm in spec.list_arms():
        for number, decay in enumerate((0, 1e-4, 0.5)):
            tuned = {"weight_decay": decay, "learning_rate": 1e-2}
            trial = spec.trial(arm, tuned, phase="search", number=number, seed=0)
            records.append(replace(done, arm=arm.name, parameters=json.loads(json.dumps(trial.parameters))))
    found = search_points(spec, records)
    assert {p.parameters["weight_decay"] for p in found} == {0, 1e-4}  # 0.5 is no choice of the file any more
    assert {p.parameters["augment"] for p in found} == {(), ("turns",)}
    assert importance(spec, [replace(p, value=i, outcome=Outcome.COMPLETE) for i, p in enumerate(found)])
    assert all(path.exists() for path in search_slices(spec, found, tmp_path / "slices"))


def test_a_search_of_which_nothing_ended_well_can_be_drawn(tmp_path, spec):
    failed = [replace(p, outcome=Outcome.FAILED) for p in points(lambda _p: 0.5)]
    assert all(path.exists() for path in search_slices(spec, failed, tmp_path / "slices"))
