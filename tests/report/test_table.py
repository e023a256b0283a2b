from __future__ import annotations

import io
from dataclasses import replace

import pytest
from fabricated_study import RANDOM, STEM, WHOLE, YAML, make_spec, make_trials
from rich.console import Console

from studytool.report.compare import TargetCost, summarize_arms
from studytool.report.statistics import Interval
from studytool.report.table import plain_text, table_notes, table_text
from studytool.report.words import duration


@pytest.fixture
def spec(tmp_path):
    return make_spec(tmp_path)


@pytest.fixture
def summaries(spec):
    return summarize_arms(spec, [record for _, record in make_trials(spec)])


def row(text: str, arm: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(arm))


def test_the_table_says_what_was_reached_how_sure_it_is_and_what_it_cost(spec, summaries):
    exact = [
        replace(s, test={"balanced_accuracy": Interval(0.8765, 0.8512, 0.9018, 0.0102, 3)}) if s.arm == WHOLE else s
        for s in summaries
    ]
    text = plain_text(exact, spec)
    assert text.splitlines()[0] == "fabricated: test balanced accuracy in %"
    line = row(text, WHOLE)
    gain = next(s for s in summaries if s.arm == WHOLE).gain.interval
    assert "87.6 [85.1,90.2]  1.0" in line or "87.7 [85.1,90.2]  1.0" in line
    assert f"{100 * gain.mean:+.1f} [{100 * gain.low:+.1f},{100 * gain.high:+.1f}]" in line
    assert "2.3 min" in line
    assert "24 s" in line
    assert "never (0/3)" in row(text, RANDOM)


def test_the_best_arm_stands_first_and_is_marked(spec, summaries):
    lines = plain_text(summaries, spec).splitlines()
    arms = [line.split()[0] for line in lines[3:6]]
    assert arms == [WHOLE, STEM, RANDOM]
    assert [" * " in line for line in lines[3:6]] == [True, False, False]


def test_notes_say_how_to_read_it(spec, summaries):
    notes = "\n".join(table_notes(summaries, spec))
    assert "best arm: chosen by validation (mean of val/balanced_accuracy over 3 seeds)" in notes
    assert f"to {RANDOM}, paired by seed" in notes
    assert "15 complete, 3 pruned, 3 failed" in notes
    assert "2 trials ran side by side on one device: seconds are indicative only" in notes
    alone = [replace(s, side_by_side=1) for s in summaries]
    assert "side by side" not in "\n".join(table_notes(alone, spec))


def test_what_is_not_there_yet_is_said_so(spec):
    search_only = [record for _, record in make_trials(spec) if record.phase == "search"]
    summaries = summarize_arms(spec, search_only)
    assert "not confirmed yet" in row(plain_text(summaries, spec), STEM)
    assert "nothing is confirmed yet" in table_notes(summaries, spec)[0]
    nothing = plain_text(summarize_arms(spec, []), spec)
    assert "best arm" not in nothing
    assert row(nothing, WHOLE).split()[1:] == ["not", "confirmed", "yet"]


def test_one_seed_has_no_interval(spec, summaries):
    single = [replace(s, test={"balanced_accuracy": Interval(0.5, None, None, None, 1)}) for s in summaries]
    assert "50.0 (1 seed)" in plain_text(single, spec)
    alike = [replace(s, test={"balanced_accuracy": Interval(0.5, None, None, 0.0, 3)}) for s in summaries]
    assert "50.0 (3 alike)" in plain_text(alike, spec)


def test_some_that_never_reached_the_target_are_counted(spec, summaries):
    some = [replace(s, target=TargetCost(s.mean_confirm_cost, 2, 1)) for s in summaries]
    assert "24 s (2/3)" in row(plain_text(some, spec), WHOLE)


def test_without_a_target_there_is_no_such_column(tmp_path):
    spec = make_spec(tmp_path, YAML.replace(", target: 0.7", ""))
    assert "target" not in plain_text(summarize_arms(spec, [record for _, record in make_trials(spec)]), spec)


def test_plain_text_has_no_control_characters_and_whole_arm_names(spec, summaries):
    long = [replace(s, arm=s.arm + "-with-a-very-long-name" * 6) for s in summaries]
    text = plain_text(long, spec)
    assert all(character == "\n" or character.isprintable() for character in text)
    assert all(s.arm in text for s in long)


@pytest.mark.parametrize("width", [80, 100, 140])
def test_no_number_is_cut_on_a_narrow_terminal(spec, summaries, width):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table_text(summaries, spec))
    shown = console.file.getvalue()
    assert "…" not in shown
    words = {word for line in plain_text(summaries, spec).splitlines()[3:6] for word in line.split()[1:]}
    assert words - {"*"} <= set(shown.split())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.418, "0.42 s"), (9.6, "9.6 s"), (35.2, "35 s"), (252, "4.2 min"), (3000, "50 min"), (11160, "3.1 h"),
     (207360, "2.4 d"), (0, "0 s")],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text
