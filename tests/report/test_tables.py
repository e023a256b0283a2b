from __future__ import annotations

import csv
import io
from dataclasses import replace

import pytest
from fabricated_study import RANDOM, STEM, WHOLE, YAML, make_spec, make_trials

from studytool.report.across import across_table, answers_table
from studytool.report.export import write_tables
from studytool.report.sections import StudyResults
from studytool.report.tables import Table, arms_table, claims_tables, front_table, time_table
from studytool.report.words import duration


@pytest.fixture
def results(tmp_path):
    spec = make_spec(tmp_path, YAML + "resources: {price_per_device_hour: 3.6, currency: EUR}\n")
    return StudyResults(spec, [record for _, record in make_trials(spec)], spec.folder)


def by_name(table: Table) -> dict[str, dict[str, str]]:
    return {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}


def test_the_arms_stand_best_first_with_scores_gap_cost_and_price(results):
    table = arms_table(results.spec, results.summaries, results.gaps)
    assert [row[0] for row in table.rows] == [WHOLE, STEM, RANDOM]
    assert table.best == {0}
    rows = by_name(table)
    assert rows[WHOLE]["behind the best, points"] == "best"
    mean = 100 * results.gaps[STEM].interval.mean
    assert rows[STEM]["behind the best, points"].startswith(f"{mean:.1f} [")
    assert rows[RANDOM]["to target"] == "never (0/3)"
    # 10 trials' epochs of 4.02 device-seconds at a thousandth of a euro each: search 6 + 6 + 3 + 1, confirm 3 * 6.
    assert rows[WHOLE]["price of whole arm"] == f"{34 * 4.02 / 1000:.2f} EUR"


def test_the_claims_are_two_tables_or_one_without_a_target(tmp_path, results):
    difference, ratio = claims_tables(results.spec, results.comparisons)
    assert by_name(difference)[WHOLE]["verdict"] == "better"
    assert by_name(difference)[WHOLE]["more seeds"] == "settled"
    assert by_name(ratio)[STEM]["random never"] == "3 of 3"
    assert by_name(ratio)[STEM]["itself never reached it"] == "0 of 3"
    assert by_name(ratio)[STEM]["cost to target / that of random"].startswith("at most 0.")
    assert RANDOM in difference.notes[0]
    spec = make_spec(tmp_path, YAML.replace(", target: 0.7", ""))
    assert len(claims_tables(spec, results.comparisons)) == 1


def test_time_by_phase_says_what_was_not_measured(results):
    row = by_name(time_table(results.spec, results.records, results.summaries))[WHOLE]
    assert row["train"] == "1.8 min"  # 34 epochs of 3.2 s
    assert row["volumes/s"] == "50"  # 160 volumes in 3.2 s
    assert row["energy"] == "not measured"


def test_time_by_phase_tells_the_cost_without_the_cache_where_there_was_one(results):
    assert "without cache" not in time_table(results.spec, results.records, results.summaries).columns
    [first, *others] = results.summaries
    cached = replace(first, search_cost=replace(first.search_cost, cache_saved_seconds=first.cost.seconds))
    table = time_table(results.spec, results.records, [cached, *others])
    place = table.columns.index("without cache")
    assert table.rows[0][place] == duration(2 * first.cost.device_seconds)
    assert table.rows[1][place] == duration(others[0].cost.device_seconds)


def test_the_front_of_the_search_stands_from_cheap_to_dear_within_each_arm(results):
    assert front_table(results.spec, results.records) is None
    searched = [r for r in results.records if r.phase == "search" and r.last]
    chosen = {r.trial_id for r in searched[::2]}
    records = [replace(r, on_pareto_front=r.trial_id in chosen) for r in results.records]
    table = front_table(results.spec, records)
    assert table is not None
    assert {row[0] for row in table.rows} == chosen
    arms = [arm.name for arm in results.spec.list_arms()]
    cost = {r.trial_id: (arms.index(r.arm), r.cost.device_seconds) for r in records}
    assert [row[0] for row in table.rows] == sorted(chosen, key=cost.__getitem__)
    assert table.columns[1:-2] == tuple(name.replace("_", " ") for name in results.spec.search.space)


def test_csv_can_be_read_back(results):
    table = arms_table(results.spec, results.summaries, results.gaps)
    rows = list(csv.reader(io.StringIO(table.csv())))
    assert tuple(rows[0]) == table.columns
    assert tuple(map(tuple, rows[1:])) == table.rows


def test_latex_escapes_and_makes_the_best_bold(results):
    text = arms_table(results.spec, results.summaries, results.gaps).latex()
    assert r"\textbf{r2plus1d\_18.kinetics400.none}" in text
    assert text.count(r"\\") == 4
    assert r"\begin{tabular}{lrrrrrrrrrr}" in text
    odd = Table("t", ("a_b", "50%"), (("{x}", "−1 & 2"),))
    assert r"a\_b & 50\% \\" in odd.latex()
    assert r"\{x\} & $-$1 \& 2 \\" in odd.latex()


def test_three_csv_files_hold_every_trial_arm_and_epoch(results):
    paths = write_tables(results.spec, results.records, results.summaries, results.comparisons, results.folder)
    trials, arms, curves = (list(csv.DictReader(path.open())) for path in paths)
    assert [path.name for path in paths] == ["trials.csv", "arms.csv", "curves.csv"]
    assert len(trials) == len(results.records)
    assert {row["outcome"] for row in trials} == {"COMPLETE", "PRUNED", "FAILED"}
    assert [row["arm"] for row in arms] == [s.arm for s in results.summaries]
    whole = next(row for row in arms if row["arm"] == WHOLE)
    summary = next(s for s in results.summaries if s.arm == WHOLE)
    assert float(whole["test_balanced_accuracy_mean"]) == pytest.approx(summary.test["balanced_accuracy"].mean)
    assert float(whole["difference_low"]) == pytest.approx(summary.gain.interval.low)
    assert whole["cost_ratio_bound"] == "at most"
    assert len(curves) == sum(len(r.epochs) for r in results.records)
    assert float(curves[-1]["idle_seconds"]) == 0.0


def test_studies_stand_side_by_side(results):
    spec = results.spec.model_copy(update={"name": "other"})
    other = StudyResults(spec, [replace(r) for r in results.records if r.arm != STEM], spec.folder)
    across = by_name(across_table([results, other]))
    assert across[STEM]["other"] == "–"
    assert across[WHOLE]["fabricated"].startswith("* 8")
    answers = by_name(answers_table([results, other]))
    assert answers["other"]["best arm"] == WHOLE
    assert answers["fabricated"]["state"] == "finished"
    assert answers["other"]["state"] == "1 arm not finished"
