from __future__ import annotations

import dataclasses
import shutil

import pytest
from synthetic_study import STUDY, Driver, synthetic_epochs

from studytool.results import Cost, Outcome
from studytool.study.director import RETRIES, Director
from studytool.study.events import Cause, Observer
from studytool.study.ledger import Ledger


def test_every_arm_is_searched_and_confirmed_with_the_same_seeds(driver):
    ledger = driver.run()
    search = [r for r in ledger.records if r.phase == "search"]
    confirm = [r for r in ledger.records if r.phase == "confirm"]
    assert {arm: sum(r.arm == arm for r in search) for arm in ("none", "backbone")} == {"none": 6, "backbone": 6}
    assert all(r.outcome in (Outcome.COMPLETE, Outcome.PRUNED) for r in search)
    assert all(r.outcome is Outcome.COMPLETE and r.test is not None for r in confirm)
    seeds = {arm: [r.seed for r in confirm if r.arm == arm] for arm in ("none", "backbone")}
    assert seeds["none"] == seeds["backbone"]
    assert len(set(seeds["none"])) == 2


def test_an_arm_is_confirmed_with_its_own_best_configuration(driver):
    ledger = driver.run()
    for arm in ("none", "backbone"):
        ended = [r for r in ledger.records if r.arm == arm and r.phase == "search" and r.outcome is Outcome.COMPLETE]
        best = max(ended, key=lambda r: r.last.best_value)
        confirmed = [r for r in ledger.records if r.arm == arm and r.phase == "confirm"]
        assert {r.parameters["learning_rate"] for r in confirmed} == {best.parameters["learning_rate"]}
        assert {r.source for r in confirmed} == {best.number}


def test_a_worse_arm_is_not_pruned_against_a_better_one(driver, tmp_path):
    """'backbone' scores 0.8 of 'none' throughout, and still goes through the trials it would go through alone."""
    (tmp_path / "alone").mkdir()
    alone = Driver(tmp_path / "alone", STUDY.replace("[none, backbone]", "[backbone]")).run()
    both = driver.run()
    records = {r.trial_id: (r.outcome, len(r.epochs)) for r in both.records if r.arm == "backbone"}
    assert records == {r.trial_id: (r.outcome, len(r.epochs)) for r in alone.records}


def test_asha_prunes_and_a_pruned_trial_ran_fewer_epochs(driver):
    records = driver.run().records
    pruned = [r for r in records if r.outcome is Outcome.PRUNED]
    assert pruned
    assert all(len(r.epochs) in (1, 2) for r in pruned)
    assert all(len(r.epochs) == 4 for r in records if r.outcome is Outcome.COMPLETE)


def test_no_step_looks_at_every_trial_so_that_a_study_does_not_slow_down_as_it_grows(tmp_path, monkeypatch):
    driver = Driver(tmp_path, f"{STUDY}budget: {{trials: 1000, device_hours: 1000}}\n")
    looks = []
    of_all = Ledger.records.fget
    monkeypatch.setattr(Ledger, "records", property(lambda ledger: looks.append(1) or of_all(ledger)))
    ledger = driver.run()
    assert looks == []
    assert len(ledger.records) == 16
    assert len(looks) == 1


def test_arms_take_turns(driver):
    driver.run()
    first_epochs = [trial_id for trial_id, epoch in driver.epochs_run if epoch == 1]
    arms = [trial_id.split(".")[0] for trial_id in first_epochs if "search" in trial_id]
    assert arms == ["none", "backbone"] * 6


@pytest.mark.parametrize("kill_after", [0, 1, 5, 12, 21, 34])
def test_a_study_killed_anywhere_ends_as_if_it_had_not_been(tmp_path, kill_after):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole, killed = Driver(tmp_path / "whole"), Driver(tmp_path / "killed")
    expected = whole.outcome_of(whole.run())
    killed.run(kill_after=kill_after)
    assert killed.outcome_of(killed.run()) == expected
    assert killed.epochs_run == whole.epochs_run  # nothing twice, nothing left out, the same order


@pytest.mark.parametrize("noted", [True, False], ids=["noted", "not noted"])
@pytest.mark.parametrize("end", [0, 1, 2, 5, 11])
def test_a_study_killed_between_an_epoch_and_what_follows_from_it_ends_as_if_it_had_not_been(
    tmp_path, monkeypatch, end, noted
):
    """The last epoch of a trial is in the ledger; that it has ended is not, where an earlier version ran."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole, killed = Driver(tmp_path / "whole"), Driver(tmp_path / "killed")
    expected = whole.outcome_of(whole.run())
    ends = []

    def killed_at_the_end(ledger, trial_id, result, device, outcome):
        ends.extend([trial_id] if outcome else [])
        if len(ends) == end + 1:
            add_epoch(ledger, trial_id, result, device, outcome if noted else None)
            raise KeyboardInterrupt
        return add_epoch(ledger, trial_id, result, device, outcome)

    add_epoch = Ledger.add_epoch
    monkeypatch.setattr(Ledger, "add_epoch", killed_at_the_end)
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    monkeypatch.undo()
    assert killed.outcome_of(killed.run()) == expected
    assert killed.epochs_run == whole.epochs_run


def test_a_finished_study_runs_nothing_again(driver):
    driver.run()
    done = list(driver.epochs_run)
    driver.run()
    assert driver.epochs_run == done


def test_more_seeds_run_only_what_is_new(driver, tmp_path):
    driver.run()
    more = Driver(tmp_path, STUDY.replace("seeds: 2", "seeds: 3"))
    more.run()
    assert sorted(more.epochs_run) == [(t, e) for t in sorted({t for t, _ in more.epochs_run}) for e in (1, 2, 3, 4)]
    assert len({t for t, _ in more.epochs_run}) == 2
    assert all(t.endswith("seed-2") for t, _ in more.epochs_run)


def test_a_better_configuration_found_later_is_confirmed_under_ids_of_its_own(driver, tmp_path):
    first = {r.trial_id for r in driver.run().records}
    more = Driver(tmp_path, STUDY.replace("trials_per_arm: 6", "trials_per_arm: 40"))
    ledger = more.run()
    assert first <= {r.trial_id for r in ledger.records}
    for arm in ("none", "backbone"):
        ended = [r for r in ledger.records if (r.arm, r.phase, r.outcome) == (arm, "search", Outcome.COMPLETE)]
        best = max(ended, key=lambda r: r.last.best_value)
        assert sum(r.source == best.number for r in ledger.records if r.arm == arm) == 2


def test_without_anything_to_tune_the_arms_are_confirmed_at_once(tmp_path):
    driver = Driver(tmp_path, STUDY.replace("  learning_rate: {log_uniform: [1e-4, 1e-1]}\n", ""))
    assert {r.phase for r in driver.run().records} == {"confirm"}


def test_failed_trials_are_failed_and_an_arm_without_survivors_is_not_confirmed(driver):
    ledger = Ledger(driver.spec, "data")
    director = Director(driver.spec, ledger, "data")
    while not director.finished:
        trial = director.next_trial()
        if trial.arm == "backbone":
            director.failed(trial.trial_id, "the loss is not finite")
            continue
        for result in synthetic_epochs(trial):
            if director.epoch(trial.trial_id, result):
                break
    broken = [r for r in ledger.records if r.arm == "backbone"]
    assert {r.phase for r in broken} == {"search"}
    assert {(r.outcome, r.message) for r in broken} == {(Outcome.FAILED, "the loss is not finite")}
    assert sum(r.phase == "confirm" and r.outcome is Outcome.COMPLETE for r in ledger.records) == 2
    ledger.close()


def test_a_metric_that_is_not_a_number_fails_the_trial(driver):
    ledger = Ledger(driver.spec, "data")
    director = Director(driver.spec, ledger, "data")
    trial = director.next_trial()
    result = next(synthetic_epochs(trial))
    undefined = dataclasses.replace(result, val=dataclasses.replace(result.val, balanced_accuracy=float("inf")))
    assert director.epoch(trial.trial_id, undefined)
    assert ledger.get(trial.trial_id).outcome is Outcome.FAILED
    ledger.close()


def test_an_epoch_that_comes_again_after_a_retry_is_not_counted_twice(driver):
    ledger = Ledger(driver.spec, "data")
    director = Director(driver.spec, ledger, "data")
    trial = director.next_trial()
    first = next(synthetic_epochs(trial))
    assert not director.epoch(trial.trial_id, first)
    director.failed(trial.trial_id, "its process died", cause=Cause.WORKER)
    again = director.next_trial()
    assert again == trial
    assert not director.epoch(trial.trial_id, first)
    assert len(ledger.get(trial.trial_id).epochs) == 1
    assert ledger.get(trial.trial_id).attempts == 2
    ledger.close()


@pytest.mark.parametrize("lost", ["none.search-002", "none.search-005", "backbone.search-000"])
def test_a_trial_whose_folder_was_removed_is_said_and_run_again_alone(driver, lost):
    ledger = driver.run()
    before, driver.epochs_run = driver.outcome_of(ledger), []
    shutil.rmtree(ledger.trial_folder(lost))
    again = driver.run()
    assert {trial_id for trial_id, _ in driver.epochs_run} == {lost}
    after = driver.outcome_of(again)
    assert after.pop(lost)[2] == before.pop(lost)[2]  # it may be pruned later or earlier: it has other peers now
    assert after == before
    is_last = lost.endswith("5")
    assert again.notes == (() if is_last else (f"{lost[:-11]}: search trial {int(lost[-1])} is gone; it is run again",))


def test_a_removed_trial_gets_the_configuration_that_was_confirmed_whatever_would_be_proposed_now(driver):
    ledger = driver.run()
    (confirmed, _) = [r for r in ledger.records if r.arm == "none" and r.phase == "confirm"]
    lost = f"none.search-{confirmed.source:03d}"
    rate = ledger.get(lost).parameters["learning_rate"]
    for number in range(confirmed.source):  # what was seen before it is no longer what had been seen then
        shutil.rmtree(ledger.trial_folder(f"none.search-{number:03d}"))
    shutil.rmtree(ledger.trial_folder(lost))
    assert driver.run().get(lost).parameters["learning_rate"] == rate


class _Heard(Observer):
    def __init__(self) -> None:
        self.broken: list[tuple[str, str, bool]] = []

    def attempt_failed(self, record, message, details, *, again):
        self.broken.append((message, details, again))


def test_a_trial_whose_workers_keep_dying_is_failed_after_two_retries(driver):
    ledger, heard = Ledger(driver.spec, "data"), _Heard()
    director = Director(driver.spec, ledger, "data", [heard])
    trial = director.next_trial()
    for _attempt in range(RETRIES):
        director.failed(trial.trial_id, "its process died", cause=Cause.WORKER, details="the end")
        assert director.next_trial() == trial
    director.failed(trial.trial_id, "its process died", cause=Cause.WORKER)
    assert ledger.get(trial.trial_id).outcome is Outcome.FAILED
    assert ledger.get(trial.trial_id).attempts == 1 + RETRIES
    assert [again for _, _, again in heard.broken] == [True, True, False]
    assert heard.broken[0] == ("its process died", "the end", True)
    ledger.close()


def test_a_trial_whose_nodes_are_lost_is_never_given_up(driver):
    ledger = Ledger(driver.spec, "data")
    director = Director(driver.spec, ledger, "data")
    trial = director.next_trial()
    for _attempt in range(RETRIES + 3):
        director.failed(trial.trial_id, "its node was lost", cause=Cause.NODE)
        assert director.next_trial() == trial
    assert ledger.get(trial.trial_id).outcome is None
    ledger.close()


def test_epochs_that_have_to_be_trained_again_were_lost_once(driver):
    ledger = Ledger(driver.spec, "data")
    director = Director(driver.spec, ledger, "data")
    trial = director.next_trial()
    epochs = [dataclasses.replace(e, cost=Cost(device_seconds=10.0 * e.epoch)) for e in synthetic_epochs(trial)]
    for epoch in epochs[:3]:
        director.epoch(trial.trial_id, epoch)
    director.failed(trial.trial_id, "its process died", cause=Cause.WORKER, lost=2.0)
    assert director.next_trial() == trial
    # The checkpoint was that of the first epoch; the two after it take 11 s each now.
    director.epoch(trial.trial_id, epochs[0])
    for epoch in epochs[1:]:
        again = dataclasses.replace(epoch, cost=Cost(device_seconds=10.0 + 11.0 * (epoch.epoch - 1)))
        director.epoch(trial.trial_id, again)
        if epoch.epoch == 3:
            assert ledger.get(trial.trial_id).cost_with_lost.device_seconds == 10 + 2 * 11 + 22
            # All of these were written, and come again as they are.
            director.failed(trial.trial_id, "its node was lost", cause=Cause.NODE)
            assert director.next_trial() == trial
            director.epoch(trial.trial_id, epochs[0])
            director.epoch(trial.trial_id, ledger.get(trial.trial_id).epochs[1])
            director.epoch(trial.trial_id, again)
    cost = ledger.get(trial.trial_id).cost_with_lost
    assert cost.lost_device_seconds == 2.0 + 20.0
    assert cost.device_seconds == 10 + 3 * 11 + 22, "what the whole trial took, twice trained epochs twice"
    assert [e.cost.device_seconds for e in ledger.get(trial.trial_id).epochs] == [10, 21, 32, 43]
    ledger.close()


def test_a_trial_out_of_memory_is_tried_once_more_in_more_parts_also_after_a_resume(driver):
    ledger = Ledger(driver.spec, "data")
    director = Director(driver.spec, ledger, "data")
    trial = director.next_trial()
    assert not director.needs_room(trial.trial_id)
    director.failed(trial.trial_id, "tried to allocate 8 GiB", cause=Cause.MEMORY)
    ledger.close()
    ledger = Ledger(driver.spec, "data")
    director = Director(driver.spec, ledger, "data")
    again = director.next_trial()
    assert (again.trial_id, again.train.accumulate, again.train.batch_size) == (trial.trial_id, 4, 32)
    assert again.model_copy(update={"train": trial.train}) == trial
    assert director.needs_room(trial.trial_id)
    director.failed(trial.trial_id, "tried to allocate 8 GiB", cause=Cause.MEMORY)
    record = ledger.get(trial.trial_id)
    assert record.outcome is Outcome.FAILED
    assert record.message.startswith("out of memory: tried to allocate 8 GiB; lower batch_size")
    ledger.close()


def test_without_retry_a_trial_out_of_memory_fails_at_once(tmp_path):
    driver = Driver(tmp_path, STUDY.replace("{max_epochs: 4}", "{max_epochs: 4, retry_out_of_memory: false}"))
    ledger = Ledger(driver.spec, "data")
    director = Director(driver.spec, ledger, "data")
    trial = director.next_trial()
    director.failed(trial.trial_id, "no", cause=Cause.MEMORY)
    assert ledger.get(trial.trial_id).outcome is Outcome.FAILED
    assert director.next_trial().trial_id != trial.trial_id
    ledger.close()
