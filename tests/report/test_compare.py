from __future__ import annotations

from dataclasses import replace

import pytest
from fabricated_study import RANDOM, STEM, WHOLE, YAML, make_epochs, make_record, make_spec, make_trials

from studytool.report.compare import headline_metric, mean_cost, reference_arm, summarize_arms
from studytool.report.statistics import mean_interval
from studytool.results import Cost, Outcome, TrialRecord


@pytest.fixture
def spec(tmp_path):
    return make_spec(tmp_path)


@pytest.fixture
def records(spec) -> list[TrialRecord]:
    return [record for _, record in make_trials(spec)]


def by_arm(spec, records):
    return {summary.arm: summary for summary in summarize_arms(spec, records)}


def with_values(record: TrialRecord, *, val: float | None = None, test: float | None = None) -> TrialRecord:
    """The record with another best validation value, or another test score."""
    last = record.epochs[-1]
    if val is not None:
        last = replace(last, best_value=val)
    if test is not None:
        last = replace(last, test=replace(last.test, balanced_accuracy=test))
    return replace(record, epochs=(*record.epochs[:-1], last))


def changed(records, chosen, **values):
    return [with_values(r, **values) if chosen(r) else r for r in records]


def test_every_arm_is_summarized_in_the_order_of_the_file(spec, records):
    summaries = summarize_arms(spec, records[::-1])
    assert [s.arm for s in summaries] == [RANDOM, WHOLE, STEM]
    assert summaries[1].values == {"backbone": "r2plus1d_18", "init": "kinetics400", "freeze": "none"}


def test_scores_are_the_means_of_the_confirm_runs(spec, records):
    summary = by_arm(spec, records)[WHOLE]
    tests = [r.test for r in records if r.arm == WHOLE and r.phase == "confirm"]
    assert summary.confirmed == 3
    assert summary.test["balanced_accuracy"] == mean_interval([t.balanced_accuracy for t in tests], lowest=0, highest=1)
    assert summary.test["macro_auc"].mean == pytest.approx(sum(t.macro_auc for t in tests) / 3)
    best = [r.epochs[-1].best_value for r in records if r.arm == WHOLE and r.phase == "confirm"]
    assert summary.validation.mean == pytest.approx(sum(best) / 3)


def test_the_selected_epoch_counts_best_or_last(tmp_path, records):
    spec = make_spec(tmp_path, YAML.replace("target: 0.7", "select: last"))
    last = [r.epochs[-1].val.balanced_accuracy for r in records if r.arm == WHOLE and r.phase == "confirm"]
    assert by_arm(spec, records)[WHOLE].validation.mean == pytest.approx(sum(last) / 3)


def test_counts_costs_and_parameters(spec, records):
    summary = by_arm(spec, records)[STEM]
    own = [r for r in records if r.arm == STEM]
    assert summary.counts == {Outcome.COMPLETE: 5, Outcome.PRUNED: 1, Outcome.FAILED: 1}
    seconds = {
        phase: sum(r.epochs[-1].cost.device_seconds for r in own if r.phase == phase) for phase in ("search", "confirm")
    }
    assert summary.search_cost.device_seconds == pytest.approx(seconds["search"])
    assert summary.confirm_cost.device_seconds == pytest.approx(seconds["confirm"])
    assert summary.cost.device_seconds == pytest.approx(sum(seconds.values()))
    assert summary.mean_confirm_cost.device_seconds == pytest.approx(seconds["confirm"] / 3)
    failed = next(r for r in own if r.outcome is Outcome.FAILED)
    lost = [replace(r, lost_device_seconds=7.0) if r is failed else r for r in records]
    dearer = by_arm(spec, lost)[STEM]
    assert dearer.search_cost.device_seconds == pytest.approx(seconds["search"] + 7)
    assert dearer.mean_confirm_cost == summary.mean_confirm_cost
    assert summary.mean_confirm_cost.samples == 960
    assert summary.mean_confirm_cost.peak_memory_gib == 0.8
    assert summary.best_parameters == {"learning_rate": 1e-3}
    assert summary.best_search_value == max(r.epochs[-1].best_value for r in own if r.phase == "search")
    assert summary.side_by_side == 2


def test_a_study_without_confirmation_has_a_winner_by_its_search(tmp_path):
    spec = make_spec(tmp_path, YAML.replace("seeds: 3", "seeds: 0"))
    summaries = summarize_arms(spec, [r for _, r in make_trials(spec)])
    assert all(s.is_finished for s in summaries)
    assert [s.arm for s in summaries if s.is_winner] == [WHOLE]


def test_while_an_arm_waits_for_its_confirmation_the_search_says_who_leads(spec, records):
    some = [r for r in records if r.phase == "search" or r.arm == RANDOM]
    assert [name for name, s in by_arm(spec, some).items() if s.is_winner] == [WHOLE]


def test_the_winner_is_chosen_by_validation_and_never_by_test(spec, records):
    assert [s.arm for s in summarize_arms(spec, records) if s.is_winner] == [WHOLE]
    misleading = changed(records, lambda r: r.arm == RANDOM and r.test, test=1.0)
    assert [s.arm for s in summarize_arms(spec, misleading) if s.is_winner] == [WHOLE]
    better = changed(records, lambda r: r.arm == RANDOM and r.phase == "confirm", val=0.99)
    assert [s.arm for s in summarize_arms(spec, better) if s.is_winner] == [RANDOM]


def test_a_search_value_does_not_beat_confirmed_ones(spec, records):
    lucky = changed(records, lambda r: r.arm == RANDOM and r.phase == "search", val=0.999)
    assert [s.arm for s in summarize_arms(spec, lucky) if s.is_winner] == [WHOLE]


def test_of_equal_arms_the_cheaper_one_wins(spec, records):
    equal = changed(records, lambda r: r.phase == "confirm", val=0.8)
    assert [s.arm for s in summarize_arms(spec, equal) if s.is_winner] == [STEM]


def test_a_loss_is_better_when_smaller(tmp_path):
    text = YAML.replace("{name: val/balanced_accuracy, mode: max, target: 0.7}", "{name: val/loss, mode: min}")
    spec = make_spec(tmp_path, text)
    records = changed([r for _, r in make_trials(spec)], lambda r: True, val=0.5)
    records = changed(records, lambda r: r.arm == STEM and r.phase == "confirm", val=0.1)
    assert [s.arm for s in summarize_arms(spec, records) if s.is_winner] == [STEM]
    assert headline_metric(spec) == "balanced_accuracy"


def test_before_anything_is_confirmed_the_search_tells(spec, records):
    search = [r for r in records if r.phase == "search"]
    summaries = by_arm(spec, search)
    assert summaries[WHOLE].is_winner
    assert summaries[WHOLE].test == {}
    assert summaries[WHOLE].validation is None
    assert summaries[WHOLE].gain is None
    assert summaries[WHOLE].mean_confirm_cost is None
    assert not summaries[WHOLE].is_finished


def test_without_any_trial_nothing_is_claimed(spec):
    summaries = summarize_arms(spec, [])
    assert not any(s.is_winner or s.is_finished for s in summaries)
    assert {s.best_search_value for s in summaries} == {None}
    assert {s.best_trial for s in summaries} == {None}


def test_running_trials_cost_but_do_not_count(spec, records):
    running = [replace(r, outcome=None) if r.trial_id == f"{WHOLE}.confirm-001-seed-2" else r for r in records]
    summary = by_arm(spec, running)[WHOLE]
    assert summary.confirmed == 2
    assert summary.counts[Outcome.COMPLETE] == 4
    assert summary.cost == by_arm(spec, records)[WHOLE].cost
    assert not summary.is_finished


def test_an_arm_is_finished_when_no_trial_is_left(spec, records):
    assert all(s.is_finished for s in summarize_arms(spec, records))
    without_one = [r for r in records if r.trial_id != f"{STEM}.search-003"]
    assert not by_arm(spec, without_one)[STEM].is_finished
    assert by_arm(spec, without_one)[WHOLE].is_finished
    all_failed = [replace(r, outcome=Outcome.FAILED) for r in records if r.phase == "search"]
    assert by_arm(spec, all_failed)[STEM].is_finished


def test_gains_are_paired_by_seed_with_the_random_arm(spec, records):
    summary = by_arm(spec, records)[WHOLE]
    score = {
        (r.arm, r.seed): r.test.balanced_accuracy for r in records if r.phase == "confirm" and r.arm in (WHOLE, RANDOM)
    }
    differences = [round(value - score[RANDOM, seed], 12) for (arm, seed), value in score.items() if arm == WHOLE]
    assert summary.reference == RANDOM
    assert summary.gain.interval == mean_interval(differences)
    assert by_arm(spec, records)[RANDOM].gain is None
    fewer = [r for r in records if not (r.arm == RANDOM and r.phase == "confirm" and r.number == 0)]
    assert by_arm(spec, fewer)[WHOLE].gain.interval.count == 2


def test_the_reference_has_the_same_other_factors(tmp_path):
    text = YAML.replace("exclude:\n  - {init: random, freeze: stem}\n", "").replace(
        "backbone: [r2plus1d_18]", "backbone: [r2plus1d_18, r3d_18]"
    )
    spec = make_spec(tmp_path, text)
    assert reference_arm(spec, "r3d_18.kinetics400.stem") == "r3d_18.random.stem"
    assert reference_arm(spec, "r2plus1d_18.kinetics400.none") == "r2plus1d_18.random.none"
    assert reference_arm(spec, "r3d_18.random.stem") is None


def test_a_frozen_arm_whose_random_twin_is_left_out_is_compared_with_the_unfrozen_one(spec, tmp_path):
    assert reference_arm(spec, STEM) == RANDOM
    without_init = make_spec(tmp_path, YAML.replace("init: [random, kinetics400]", "init: [kinetics400]"))
    assert reference_arm(without_init, STEM) is None


def test_cost_to_target_counts_those_that_never_reached_it(spec, records):
    summaries = by_arm(spec, records)
    assert (summaries[RANDOM].target.reached, summaries[RANDOM].target.never) == (0, 3)
    assert summaries[RANDOM].target.mean is None
    assert (summaries[WHOLE].target.reached, summaries[WHOLE].target.never) == (3, 0)
    first = [
        next(e for e in r.epochs if e.best_value >= 0.7) for r in records if r.arm == WHOLE and r.phase == "confirm"
    ]
    expected = sum(e.cost.device_seconds for e in first) / 3
    assert summaries[WHOLE].target.mean.device_seconds == pytest.approx(expected)
    assert summaries[WHOLE].cost_ratio.bound == "at most"
    assert summaries[WHOLE].cost_ratio.second_never == 3


def test_without_a_target_there_is_no_cost_to_it(tmp_path, records):
    spec = make_spec(tmp_path, YAML.replace(", target: 0.7", ""))
    assert {s.target for s in summarize_arms(spec, records)} == {None}
    assert {s.cost_ratio for s in summarize_arms(spec, records)} == {None}


def test_an_extended_study_confirms_its_new_best_configuration(spec, records):
    new = next(r for r in records if r.trial_id == f"{WHOLE}.search-000")
    found = [with_values(r, val=0.97) if r is new else r for r in records]
    assert by_arm(spec, found)[WHOLE].confirmed == 3, "the old configuration's runs count until the new one has some"
    assert not by_arm(spec, found)[WHOLE].is_finished
    arm = spec.list_arms()[1]
    trial = spec.trial(arm, {"learning_rate": 1e-4}, phase="confirm", number=0, seed=5, source=0)
    found.append(make_record(trial, Outcome.COMPLETE, make_epochs(trial, 0.9)))
    summary = by_arm(spec, found)[WHOLE]
    assert summary.confirmed == 1
    assert summary.best_parameters == {"learning_rate": 1e-4}
    assert summary.best_trial == trial.trial_id
    assert summary.confirm_cost.device_seconds > by_arm(spec, records)[WHOLE].confirm_cost.device_seconds


def test_the_trial_to_keep_is_the_best_by_validation(spec, records):
    chosen = f"{WHOLE}.confirm-001-seed-1"
    records = changed(records, lambda r: r.trial_id == chosen, val=0.98)
    assert by_arm(spec, records)[WHOLE].best_trial == chosen


def test_a_score_that_cannot_be_computed_is_left_out(spec, records):
    def without_auc(record):
        last = record.epochs[-1]
        scores = replace(last.test, macro_auc=None)
        return replace(record, epochs=(*record.epochs[:-1], replace(last, test=scores)))

    records = [without_auc(r) if r.test else r for r in records]
    assert "macro_auc" not in by_arm(spec, records)[WHOLE].test
    assert by_arm(spec, records)[WHOLE].test["accuracy"].count == 3


def test_the_mean_of_costs():
    costs = [Cost(train_seconds=2, samples=10, peak_memory_gib=1, energy_joules=4), Cost(train_seconds=4, samples=11)]
    mean = mean_cost(costs)
    assert (mean.train_seconds, mean.samples, mean.peak_memory_gib, mean.energy_joules) == (3, 10, 1, None)
    assert mean_cost([costs[0]]) == costs[0]
    assert mean_cost([]) is None


def test_the_winner_is_chosen_over_the_seeds_that_all_arms_have(spec, records):
    def is_run(arm, *numbers):
        return lambda r: r.arm == arm and r.phase == "confirm" and r.number in numbers

    # In the two seeds that both have, WHOLE is best; RANDOM was lucky in the others.
    records = changed(records, is_run(RANDOM, 0), val=0.6)
    records = changed(records, is_run(RANDOM, 1, 2), val=0.95)
    records = changed(records, is_run(WHOLE, 0, 1, 2), val=0.8)
    records = changed(records, is_run(STEM, 0, 1, 2), val=0.99)
    # Of STEM there are too few to be held against the others.
    unfinished = [r for r in records if not is_run(WHOLE, 2)(r) and not is_run(STEM, 1, 2)(r)]
    assert by_arm(spec, unfinished)[WHOLE].is_winner


def test_an_arm_of_which_most_runs_failed_is_not_chosen_for_those_that_did_not(spec, records):
    records = changed(records, lambda r: r.arm == STEM and r.phase == "confirm" and r.number == 0, val=0.99)
    records = [
        replace(r, outcome=Outcome.FAILED) if r.arm == STEM and r.phase == "confirm" and r.number else r
        for r in records
    ]
    summaries = by_arm(spec, records)
    assert (summaries[STEM].confirmed, summaries[STEM].confirm_failed) == (1, 2)
    assert not summaries[STEM].is_winner
