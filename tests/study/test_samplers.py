from __future__ import annotations

import pytest
from synthetic_study import STUDY, Driver, synthetic_epochs

from studytool.results import Outcome
from studytool.study.director import Director
from studytool.study.events import Cause
from studytool.study.ledger import Ledger

RANGE = "learning_rate: {log_uniform: [1e-4, 1e-1]}"
ASHA = "scheduler: {asha: {grace_epochs: 1, reduction_factor: 2}}"
CHOICES = "learning_rate: {choice: [1.0e-4, 1.0e-3, 1.0e-2]}"


def variant(space: str = RANGE, scheduler: str = ASHA, *, sampler: str = "tpe", trials: int = 6) -> str:
    text = STUDY.replace(RANGE, space).replace(ASHA, f"{scheduler}\n  sampler: {sampler}")
    return text.replace("trials_per_arm: 6", f"trials_per_arm: {trials}")


STUDIES = {
    "random": variant(sampler="random"),
    "grid": variant(CHOICES, sampler="grid"),
    "cmaes": variant(RANGE + "\n  weight_decay: {uniform: [0.0, 0.1]}", sampler="cmaes", trials=9),
    "nsga2": variant(scheduler="scheduler: none", sampler="nsga2", trials=9),
    "hyperband": variant(scheduler="scheduler: {hyperband: {grace_epochs: 1, reduction_factor: 2}}", trials=9),
    "median": variant(scheduler="scheduler: {median: {grace_epochs: 2, startup_trials: 2}}", trials=8),
    "none": variant(scheduler="scheduler: none"),
    "duplicates": variant(CHOICES, sampler="random", trials=8),
}


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path, name):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole, killed = Driver(tmp_path / "whole", STUDIES[name]), Driver(tmp_path / "killed", STUDIES[name])
    expected = whole.outcome_of(whole.run())
    for kill_after in range(3, len(whole.epochs_run), 8):
        killed.run(kill_after=kill_after)
    assert killed.outcome_of(killed.run()) == expected
    assert killed.epochs_run == whole.epochs_run


@pytest.mark.parametrize("name", ["hyperband", "median"])
def test_the_scheduler_prunes_some_and_lets_others_finish(tmp_path, name):
    outcomes = {r.outcome for r in Driver(tmp_path, STUDIES[name]).run().records if r.phase == "search"}
    assert outcomes == {Outcome.COMPLETE, Outcome.PRUNED}


def test_a_grid_has_every_point_once_and_no_more(tmp_path):
    records = [r for r in Driver(tmp_path, STUDIES["grid"]).run().records if r.phase == "search"]
    rates = [(r.arm, r.parameters["learning_rate"]) for r in records]
    assert sorted(rates) == [(arm, rate) for arm in ("backbone", "none") for rate in (1e-4, 1e-3, 1e-2)]


def test_a_configuration_proposed_again_takes_the_stored_result(tmp_path):
    driver = Driver(tmp_path, STUDIES["duplicates"])
    records = [r for r in driver.run().records if r.phase == "search"]
    copies = [r for r in records if r.same_as is not None]
    by_number = {(r.arm, r.number): r for r in records}
    assert len(records) == 16
    assert copies
    for copy in copies:
        original = by_number[copy.arm, copy.same_as]
        assert (original.parameters, original.outcome) == (copy.parameters, copy.outcome)
        assert original.same_as is None
        assert copy.message == f"same as trial {original.number}"
    trained = {trial_id for trial_id, _ in driver.epochs_run}
    assert trained.isdisjoint(copy.trial_id for copy in copies)
    rates = [(r.arm, r.parameters["learning_rate"]) for r in records if r.same_as is None]
    assert len(rates) == len(set(rates))


def test_a_copy_of_a_running_trial_waits_for_it_and_is_trained_if_that_fails(tmp_path):
    driver = Driver(tmp_path, variant("learning_rate: {choice: [1.0e-3]}", trials=3))
    ledger = Ledger(driver.spec, "data")
    director = Director(driver.spec, ledger, "data")
    running = [director.next_trial() for _ in range(3)]
    assert [t.trial_id if t else None for t in running] == ["none.search-000", "backbone.search-000", None]
    director.failed("none.search-000", "the worker died", cause=Cause.TRIAL)
    for result in synthetic_epochs(running[1]):
        director.epoch(running[1].trial_id, result)
    assert {r.trial_id: r.same_as for r in ledger.records if r.arm == "backbone" and r.phase == "search"} == {
        "backbone.search-000": None,
        "backbone.search-001": 0,
        "backbone.search-002": 0,
    }
    again = director.next_trial()
    assert again.trial_id == "none.search-001"
    assert ledger.get("none.search-001").same_as is None
    ledger.close()


def test_the_front_of_score_against_cost_is_kept_and_the_best_score_is_confirmed(tmp_path):
    ledger = Driver(tmp_path, STUDIES["nsga2"]).run()
    for arm in ("none", "backbone"):
        search = [r for r in ledger.records if r.arm == arm and r.phase == "search"]
        front = [r for r in search if r.on_pareto_front]
        best = max(search, key=lambda r: r.last.best_value)
        # Every trial costs the same here, so that the best one alone is on the front.
        assert front == [best]
        assert {r.source for r in ledger.records if r.arm == arm and r.phase == "confirm"} == {best.number}
