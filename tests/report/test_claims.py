from __future__ import annotations

from dataclasses import replace

import pytest
from fabricated_study import RANDOM, STEM, WHOLE, make_spec, make_trials
from scipy import stats

from studytool.report.claims import Comparison, compare_with_random, gaps_to_winner, least_seeds, scores_by_seed
from studytool.report.compare import summarize_arms
from studytool.report.statistics import CostRatio, paired_difference
from studytool.results import TrialRecord


@pytest.fixture
def study(tmp_path):
    spec = make_spec(tmp_path)
    return spec, [record for _, record in make_trials(spec)]


def scored(records: list[TrialRecord], scores: dict[str, list[float]]) -> list[TrialRecord]:
    """The records with these test scores, per arm and in the order of the seeds."""
    changed = []
    for record in records:
        if record.phase == "confirm" and record.arm in scores:
            last = record.epochs[-1]
            value = scores[record.arm][record.number]
            last = replace(last, test=replace(last.test, balanced_accuracy=value))
            record = replace(record, epochs=(*record.epochs[:-1], last))
        changed.append(record)
    return changed


def compared(spec, records) -> dict[str, Comparison]:
    return {c.arm: c for c in compare_with_random(spec, records, summarize_arms(spec, records))}


def test_every_initialization_is_compared_with_random_of_the_same_seeds(study):
    spec, records = study
    records = scored(records, {RANDOM: [0.60, 0.62, 0.64], WHOLE: [0.71, 0.72, 0.76], STEM: [0.60, 0.66, 0.62]})
    found = compared(spec, records)
    assert set(found) == {WHOLE, STEM}
    assert {c.reference for c in found.values()} == {RANDOM}
    whole = found[WHOLE].difference
    assert sorted(whole.values) == pytest.approx([0.10, 0.11, 0.12])
    # By hand: mean 0.11, deviation 0.01, half width 4.3027 * 0.01 / sqrt(3).
    assert whole.interval.mean == pytest.approx(0.11)
    assert whole.interval.high - whole.interval.mean == pytest.approx(4.30265 * 0.01 / 3**0.5, rel=1e-4)
    p = stats.ttest_1samp([0.11, 0.10, 0.12], 0).pvalue
    assert found[WHOLE].p_t_holm == pytest.approx(2 * p)
    assert found[WHOLE].p_wilcoxon_holm == pytest.approx(2 * 0.25)
    assert found[WHOLE].verdict == "better"
    assert found[WHOLE].more_seeds == 0
    assert found[STEM].verdict == "open"
    assert found[STEM].more_seeds > 0
    low, high = found[WHOLE].bootstrap
    assert 0.0999 < low < 0.11 < high < 0.1201


@pytest.mark.parametrize(
    ("differences", "p_t_holm", "verdict"),
    [
        ([0.11, 0.10, 0.12], 0.01, "better"),
        ([0.11, 0.10, 0.12], 0.06, "probably better"),
        ([-0.11, -0.10, -0.12], 0.01, "worse"),
        ([-0.11, -0.10, -0.12], 0.2, "probably worse"),
        ([-0.11, 0.10, 0.12], 0.01, "open"),
        ([0.11], None, "open"),
    ],
)
def test_a_verdict_is_as_sure_as_the_interval_and_the_corrected_test(differences, p_t_holm, verdict):
    pairs = dict(enumerate(differences))
    difference = paired_difference(pairs, dict.fromkeys(pairs, 0.0))
    assert Comparison("a", "b", difference, None, p_t_holm, None, None, None).verdict == verdict


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (CostRatio("exact", 0.3, 0.2, 0.4, 3, 0, 0), "cheaper"),
        (CostRatio("at most", 0.3, None, 0.4, 3, 0, 1), "cheaper"),
        (CostRatio("at most", 0.9, None, 1.2, 3, 0, 1), "open"),
        (CostRatio("exact", 2.0, 1.5, 3.0, 3, 0, 0), "dearer"),
        (CostRatio("at least", 2.0, 1.5, None, 3, 1, 0), "dearer"),
        (CostRatio("exact", 0.9, 0.7, 1.2, 3, 0, 0), "open"),
        (CostRatio("unknown", None, None, None, 3, 1, 1), "unknown"),
        (None, "unknown"),
    ],
)
def test_a_cost_is_lower_only_where_its_interval_says_so(ratio, verdict):
    compared = Comparison("a", "b", None, None, None, None, None, ratio, p_cost_holm=0.04)
    assert compared.cost_verdict == verdict
    uncorrected = f"probably {verdict}" if verdict in ("cheaper", "dearer") else verdict
    assert replace(compared, p_cost_holm=0.06).cost_verdict == uncorrected
    assert replace(compared, side_by_side=2).cost_verdict in ("unknown", "shared device")


def test_a_single_pair_settles_nothing(study):
    spec, records = study
    one = [r for r in records if r.phase == "search" or r.number == 0]
    found = compared(spec, one)[WHOLE]
    assert (found.verdict, found.bootstrap, found.p_t_holm, found.more_seeds) == ("open", None, None, None)


def test_without_confirm_runs_there_is_no_difference(study):
    spec, records = study
    found = compared(spec, [r for r in records if r.phase == "search"])
    assert [c.difference for c in found.values()] == [None, None]


def test_the_gap_to_the_winner_is_paired_and_positive_where_the_winner_leads(study):
    spec, records = study
    records = scored(records, {RANDOM: [0.60, 0.62, 0.64], WHOLE: [0.71, 0.72, 0.76], STEM: [0.70, 0.73, 0.72]})
    gaps = gaps_to_winner(spec, records, summarize_arms(spec, records))
    assert set(gaps) == {RANDOM, STEM}
    assert sorted(gaps[STEM].values) == pytest.approx([-0.01, 0.01, 0.04])


def test_a_score_that_an_arm_lacks_is_left_out(study):
    spec, records = study
    assert len(scores_by_seed(spec, records, WHOLE, "macro_auc")) == 3
    assert scores_by_seed(spec, [r for r in records if r.phase == "search"], WHOLE, "accuracy") == {}


def test_how_many_seeds_wilcoxon_needs(study):
    assert least_seeds(list(compared(*study).values())) == 7  # two comparisons: 2 * 2^(1 - 7) < 0.05 <= 2 * 2^(1 - 6)
