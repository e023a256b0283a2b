"""Budgets on the synthetic study, where every epoch costs one device-second."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from synthetic_study import STUDY, Driver, synthetic_epochs

from studytool.errors import SpecError
from studytool.results import Outcome
from studytool.study.budget import Budget, device_seconds_spent
from studytool.study.director import Director
from studytool.study.events import Cause
from studytool.study.ledger import Ledger

FIFO = STUDY.replace("{asha: {grace_epochs: 1, reduction_factor: 2}}", "none")


def with_budget(budget: str, *, text: str = FIFO) -> str:
    return f"{text}budget: {{{budget}}}\n"


def hours(seconds: float) -> str:
    return f"device_hours: {seconds / 3600!r}"


def test_no_more_trials_are_begun_than_allowed_and_those_run_to_their_end(tmp_path):
    ledger = Driver(tmp_path, with_budget("trials: 5")).run()
    assert len(ledger.records) == 5
    assert all(r.outcome for r in ledger.records)


@pytest.mark.parametrize("seconds", [1, 3, 4, 10.5, 30])
def test_no_epoch_is_begun_that_the_device_hours_do_not_allow(tmp_path, seconds):
    ledger = Driver(tmp_path, with_budget(hours(seconds))).run()
    assert seconds - 1 < device_seconds_spent(ledger.records) <= seconds


@pytest.mark.parametrize("cause", [Cause.NODE, Cause.TRIAL])
def test_what_breaks_off_is_paid_for_too(tmp_path, cause):
    driver = Driver(tmp_path, with_budget(hours(10)))
    ledger = Ledger(driver.spec, "data")
    director = Director(driver.spec, ledger, "data")
    attempts = 0
    while (trial := director.next_trial()) is not None:
        attempts += 1
        director.failed(trial.trial_id, "its node was lost", cause=cause, lost=2.0)
    assert attempts == 5
    assert director.stopped_by_budget
    assert device_seconds_spent(ledger.records) == ledger.totals.device_seconds == 10
    ledger.close()
    again = Ledger(driver.spec, "data")
    assert again.totals.device_seconds == 10
    assert Director(driver.spec, again, "data").stopped_by_budget
    again.close()


def test_epochs_that_are_trained_again_are_held_against_it_too(tmp_path):
    driver = Driver(tmp_path, with_budget(hours(5)))
    ledger = Ledger(driver.spec, "data")
    director = Director(driver.spec, ledger, "data")
    trial = director.next_trial()
    first, second, *_ = synthetic_epochs(trial)
    assert not director.epoch(trial.trial_id, first)
    assert not director.epoch(trial.trial_id, second)
    director.failed(trial.trial_id, "its node was lost", cause=Cause.NODE)
    assert director.next_trial() == trial
    # Nothing was written down of it: the first epoch comes again, and takes longer.
    assert director.epoch(trial.trial_id, replace(first, cost=replace(first.cost, device_seconds=2.5)))
    assert director.stopped_by_budget
    assert ledger.totals.device_seconds == 1 + 2.5 + 1, "the first epoch twice, and the second"
    assert ledger.get(trial.trial_id).outcome is None
    ledger.close()


def test_an_epoch_that_cannot_be_compared_is_paid_for(tmp_path):
    driver = Driver(tmp_path, FIFO)
    ledger = Ledger(driver.spec, "data")
    director = Director(driver.spec, ledger, "data")
    trial = director.next_trial()
    first = next(synthetic_epochs(trial))
    director.epoch(trial.trial_id, replace(first, val=replace(first.val, balanced_accuracy=math.nan)))
    record = ledger.get(trial.trial_id)
    assert record.outcome is Outcome.FAILED
    assert ledger.totals.device_seconds == record.lost_device_seconds == first.cost.device_seconds > 0
    ledger.close()


def test_the_same_as_one_that_failed_is_a_trial_more_and_waits_for_the_budget(tmp_path):
    text = STUDY.replace("{log_uniform: [1e-4, 1e-1]}", "{choice: [1.0e-3]}").replace(
        "  trials_per_arm: 6", "  trials_per_arm: 3\n  sampler: random"
    )
    driver = Driver(tmp_path, with_budget("trials: 2", text=text))
    ledger = Ledger(driver.spec, "data")
    director = Director(driver.spec, ledger, "data")
    while (trial := director.next_trial()) is not None:
        director.failed(trial.trial_id, "the disk was not there", cause=Cause.TRIAL)
    assert ledger.totals.begun == 2
    assert director.finished
    assert director.stopped_by_budget
    ledger.close()
    larger = Driver(tmp_path, with_budget("trials: 100", text=text)).run()
    assert all(record.outcome for record in larger.records)


def test_a_price_turns_device_hours_into_money(tmp_path):
    text = with_budget("max_cost: 0.01") + "resources: {price_per_device_hour: 3.6}\n"
    ledger = Driver(tmp_path, text).run()
    assert device_seconds_spent(ledger.records) == 10


def test_money_without_a_price_is_refused(tmp_path):
    with pytest.raises(SpecError, match="price_per_device_hour"):
        Driver(tmp_path, with_budget("max_cost: 0.01"))


@pytest.mark.parametrize("text", [FIFO, STUDY])
def test_a_larger_budget_goes_on_as_if_there_had_been_no_stop(tmp_path, text):
    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    whole = Driver(tmp_path / "whole", text)
    expected = whole.outcome_of(whole.run())
    epochs_run, ledger = [], None
    for budget in (hours(7), hours(19), "trials: 9", "trials: 1000"):
        stopped = Driver(tmp_path / "stopped", with_budget(budget, text=text))
        ledger = stopped.run()
        epochs_run += stopped.epochs_run
    assert stopped.outcome_of(ledger) == expected
    assert sorted(epochs_run) == sorted(whole.epochs_run)  # none twice, none left out


def test_a_stopped_trial_has_no_outcome_and_the_study_counts_as_stopped(tmp_path):
    driver = Driver(tmp_path, with_budget(hours(6)))
    driver.run()
    ledger = Ledger(driver.spec, "data")
    director = Director(driver.spec, ledger, "data")
    assert director.finished
    assert director.stopped_by_budget
    assert [(r.trial_id, len(r.epochs), r.outcome is None) for r in ledger.records] == [
        ("backbone.search-000", 2, True),
        ("none.search-000", 4, False),
    ]
    assert "0.00167 of 0.00166667 device-hours spent" in Budget(driver.spec, ledger).words()
    assert "--budget-hours 0.00333333" in Budget(driver.spec, ledger).words()
    ledger.close()


def test_what_is_running_counts_before_it_has_ended(tmp_path):
    """Of 6.5 seconds 4 are spent, so that two more trials may begin an epoch at once, but not three."""
    driver = Driver(tmp_path, with_budget(hours(6.5)))
    ledger = Ledger(driver.spec, "data")
    director = Director(driver.spec, ledger, "data")
    first = director.next_trial()
    for result in synthetic_epochs(first):
        director.epoch(first.trial_id, result)
    running = [director.next_trial() for _ in range(3)]
    assert [trial is not None for trial in running] == [True, True, False]
    assert not director.finished
    for trial in running[:2]:
        assert director.epoch(trial.trial_id, next(synthetic_epochs(trial)))
    assert director.finished
    assert device_seconds_spent(ledger.records) == 6
    ledger.close()


def test_a_study_that_fits_is_not_stopped(tmp_path):
    driver = Driver(tmp_path, with_budget("trials: 16, device_hours: 1.0"))
    driver.run()
    ledger = Ledger(driver.spec, "data")
    director = Director(driver.spec, ledger, "data")
    assert director.finished
    assert not director.stopped_by_budget
    ledger.close()
