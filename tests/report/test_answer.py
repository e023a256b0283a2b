from __future__ import annotations

from dataclasses import replace

import pytest
from fabricated_study import RANDOM, STEM, WHOLE, YAML, make_spec, make_trials

from studytool.report import words
from studytool.report.answer import answer
from studytool.report.claims import compare_with_random, gaps_to_winner
from studytool.report.compare import summarize_arms
from studytool.results import Outcome


@pytest.fixture
def study(tmp_path):
    spec = make_spec(tmp_path)
    return spec, [record for _, record in make_trials(spec)]


def said(spec, records):
    summaries = summarize_arms(spec, records)
    comparisons = compare_with_random(spec, records, summaries)
    return answer(spec, summaries, comparisons, gaps_to_winner(spec, records, summaries))


def test_the_answer_says_which_arm_by_how_much_at_what_cost_and_how_sure(study):
    spec, records = study
    found = said(spec, records)
    whole = {s.arm: s for s in summarize_arms(spec, records)}[WHOLE]
    score, gain = whole.test["balanced_accuracy"], whole.gain.interval
    assert found.headline.startswith(
        "r2plus1d_18 with Kinetics-400 video weights, nothing frozen: "
        f"{100 * score.mean:.1f}% [{100 * score.low:.1f}, {100 * score.high:.1f}] balanced accuracy, "
        f"{100 * gain.mean:.1f} points [{100 * gain.low:.1f}, {100 * gain.high:.1f}] above random initialization"
    )
    assert "costing" not in found.headline  # the fabricated trials shared a device
    alone = said(spec, [replace(r, device=None) for r in records]).headline
    times = f"{words.ratio(whole.cost_ratio)} times as much as random initialization"
    assert times.startswith("at most 0.")
    assert f"costing {times} to reach 70% validation balanced accuracy" in alone
    assert "(random initialization never did in 3 of 3 runs)" in alone
    sure = " ".join(found.how_sure)
    assert f"called {WHOLE}; found by the search: learning rate 0.001" in sure
    assert "Mean over 3 seeds" in sure
    assert "indicative only" in sure
    assert found.state == "confirmed"


def test_arms_whose_intervals_overlap_are_not_told_apart(study):
    spec, records = study
    assert any(f"cannot be told apart from {STEM}" in s for s in said(spec, records).how_sure)
    without = [r for r in records if r.arm != STEM]
    assert any(f"the closest, {RANDOM}," in s for s in said(spec, without).how_sure)


def with_test_values(records, values):
    """Confirm runs whose test metric is this, by arm and seed."""
    return [
        replace(
            r,
            epochs=(*r.epochs[:-1], replace(last, test=replace(last.test, balanced_accuracy=values[r.arm][r.number]))),
        )
        if r.phase == "confirm"
        else r
        for r in records
        for last in r.epochs[-1:]
    ]


def test_a_winner_that_the_test_split_does_not_bear_out_is_not_called_equal(study):
    spec, records = study
    two = [r for r in records if r.arm != STEM]
    changed = with_test_values(two, {WHOLE: [0.70, 0.71, 0.70], RANDOM: [0.80, 0.80, 0.81]})
    sure = " ".join(said(spec, changed).how_sure)
    assert f"on the test split it is behind {RANDOM} (−10.0 [" in sure
    assert "cannot be told apart" not in sure


def test_equal_results_of_several_pairs_are_no_single_pair(study):
    spec, records = study
    two = [r for r in records if r.arm != STEM]
    sure = " ".join(said(spec, with_test_values(two, dict.fromkeys((WHOLE, RANDOM), [1.0] * 3))).how_sure)
    assert f"the same, so it has no interval: {RANDOM} (0.0 points)" in sure
    assert "single pair" not in sure
    assert "brackets" not in sure


def test_failed_confirm_runs_are_said(study):
    spec, records = study
    failed = [
        replace(r, outcome=Outcome.FAILED) if r.arm == WHOLE and r.phase == "confirm" and r.number == 2 else r
        for r in records
    ]
    found = said(spec, failed)
    assert found.state == "confirmed in part"
    assert any("1 of its 3 confirm runs failed and are in no mean" in s for s in found.how_sure)


def test_a_metric_that_the_test_split_does_not_define_is_called_so(study):
    spec, records = study
    spec = spec.model_copy(update={"metric": spec.metric.model_copy(update={"name": "val/macro_auc"})})
    records = [
        replace(r, epochs=(*r.epochs[:-1], replace(last, test=last.test and replace(last.test, macro_auc=None))))
        for r in records
        for last in r.epochs[-1:]
    ]
    found = said(spec, records)
    assert "not defined on this test split: AUC" in found.headline
    assert found.state == "confirmed"


def test_a_difference_that_may_be_chance_is_called_so(study):
    spec, records = study
    records = [r for r in records if r.arm != STEM]
    values = {RANDOM: [0.80, 0.70, 0.90], WHOLE: [0.85, 0.80, 0.80]}
    changed = []
    for r in records:
        if r.phase == "confirm":
            last = replace(r.epochs[-1], test=replace(r.epochs[-1].test, balanced_accuracy=values[r.arm][r.number]))
            r = replace(r, epochs=(*r.epochs[:-1], last))
        changed.append(r)
    found = said(spec, changed)
    assert "1.7 points above random initialization [−" in found.headline
    assert "which may be chance" in found.headline
    assert any("more seeds would likely settle" in s for s in found.how_sure)


def test_one_seed_gives_no_interval(study):
    spec, records = study
    found = said(spec, [r for r in records if r.phase == "search" or r.number == 0])
    assert "[" not in found.headline
    assert "in the one pair of runs there is" in found.headline
    assert any("single seed" in s for s in found.how_sure)
    assert found.state == "not finished"
    assert any("3 of 3 arms have trials left" in s for s in found.how_sure)


def test_a_search_alone_is_called_optimistic_and_unfinished(study):
    spec, records = study
    found = said(spec, [r for r in records if r.phase == "search"])
    assert found.headline.startswith("So far r2plus1d_18 with Kinetics-400 video weights, nothing frozen has the best")
    assert any("It is not confirmed yet" in s for s in found.how_sure)
    assert found.state == "not confirmed"


def test_nothing_yet(study):
    spec, _ = study
    assert said(spec, []).headline == "No trial has ended with a result yet, so nothing can be said."


def test_without_a_target_the_cost_is_that_of_a_training(tmp_path, study):
    _, records = study
    spec = make_spec(tmp_path, YAML.replace(", target: 0.7", ""))
    assert said(spec, records).headline.endswith("at 24 s of device time for one training.")


def test_an_arm_that_waits_for_its_confirmation_may_be_the_best(study):
    spec, records = study
    found = said(spec, [r for r in records if r.phase == "search" or r.arm != WHOLE])
    assert found.headline.startswith("So far r2plus1d_18 with Kinetics-400 video weights, nothing frozen has the best")
    assert found.state == "not confirmed"


def test_the_best_of_the_search_leads_while_others_wait_for_their_confirmation(study):
    spec, records = study
    found = said(spec, [r for r in records if r.phase == "search" or r.arm == WHOLE])
    assert found.headline.startswith("The best so far, with 1 of 3 arms confirmed: r2plus1d_18 with")
    assert found.state == "not finished"
