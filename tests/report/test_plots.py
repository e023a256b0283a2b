from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest
from fabricated_study import CLASSES, RANDOM, STEM, WHOLE, make_spec, make_trials
from matplotlib.colors import to_rgb

from studytool.report.compare import summarize_arms
from studytool.report.plots import (
    COLOURS,
    accuracy_against_cost,
    confusion_picture,
    cost_of,
    learning_curves,
    pareto_front,
)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    spec = make_spec(tmp_path_factory.mktemp("study"))
    return spec, [record for _, record in make_trials(spec)]


@pytest.fixture(autouse=True)
def text_as_text(monkeypatch):
    """Let SVGs hold words instead of outlines, so that a test can read them."""
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")


def words(paths) -> str:
    """What the SVG says, after a look at whether the PNG is a picture at all."""
    png, svg = paths
    pixels = matplotlib.image.imread(png)
    assert min(pixels.shape[:2]) > 300
    assert np.unique(pixels[..., 0]).size > 20
    return "\n".join(element.text or "" for element in ElementTree.parse(svg).iter() if element.tag.endswith("text"))


def test_the_confusion_picture_says_shares_and_counts(tmp_path):
    confusion = ((45, 5, 0, 0), (0, 20, 20, 0), (0, 0, 7, 0), (0, 0, 0, 0))
    text = words(confusion_picture(confusion, CLASSES, tmp_path / "confusion", title="a trial"))
    lines = text.splitlines()
    assert {"a trial", "apoferritin (50)", "hexamer (7)", "ribosome (0)"} <= set(lines)
    assert {"90", "(45)", "10", "(5)", "50", "(20)", "100", "(7)"} <= set(lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["confusion.png", "confusion.svg"]


def test_dollars_in_names_are_no_formula(tmp_path):
    text = words(confusion_picture(((4, 1), (0, 3)), ("a$^$b", "$x_1$"), tmp_path / "money", title="$5 and $6"))
    assert {"a$^$b (5)", "$x_1$", "$5 and $6"} <= set(text.splitlines())


def test_many_classes_leave_no_room_for_counts(tmp_path):
    names = [f"c{i}" for i in range(24)]
    text = words(confusion_picture((77 * np.eye(24, dtype=int)).tolist(), names, tmp_path / "many", title="t"))
    assert "c23 (77)" in text
    assert "\n(77)" not in text


def test_learning_curves_name_every_confirmed_arm(tmp_path, study):
    spec, records = study
    text = words(learning_curves(spec, records, tmp_path / "curves"))
    for arm in (RANDOM, WHOLE, STEM):
        assert f"{arm} (3 seeds)" in text
    assert "validation balanced accuracy" in text
    assert "target 0.7" in text
    assert "epoch" in text
    by_time = words(learning_curves(spec, records, tmp_path / "by_time", against="device_seconds"))
    assert "device time, s" in by_time


def test_learning_curves_without_confirm_runs_say_so(tmp_path, study):
    spec, records = study
    search = [r for r in records if r.phase == "search"]
    assert "no finished confirm runs" in words(learning_curves(spec, search, tmp_path / "none"))


def test_accuracy_against_cost_marks_the_best_arm_and_warns_of_shared_devices(tmp_path, study):
    spec, records = study
    summaries = summarize_arms(spec, records)
    text = words(accuracy_against_cost(spec, summaries, tmp_path / "cost"))
    assert f"{WHOLE} (best)" in text
    assert RANDOM in text
    assert "95% interval" in text
    assert "2 trials side by side: indicative only" in text


def test_the_pareto_front_of_a_case_worked_by_hand():
    points = {
        "dear best": (9.0, 0.9),
        "beaten": (8.0, 0.7),
        "middle": (5.0, 0.8),
        "cheap": (1.0, 0.3),
        "twin": (5.0, 0.8),
    }
    assert pareto_front(points) == ["cheap", "middle", "dear best"]
    assert pareto_front({"a": (1.0, 0.9), "b": (2.0, 0.8)}) == ["a"]
    assert pareto_front({}) == []


def test_accuracy_can_be_set_against_operations_and_energy(tmp_path, study):
    spec, records = study
    summaries = summarize_arms(spec, records)
    text = words(accuracy_against_cost(spec, summaries, tmp_path / "flops", against="flops"))
    assert "operations, TFLOP, of one training (mean of the confirm runs)" in text
    assert cost_of(summaries[0], "flops") == 18.0  # six epochs of 3 TFLOP
    assert cost_of(summaries[0], "energy_joules") is None


def test_costs_far_apart_stand_on_a_logarithmic_axis_with_plain_numbers(tmp_path, study):
    spec, records = study
    summaries = summarize_arms(spec, records)
    dear = replace(summaries[0].mean_confirm_cost, device_seconds=2500.0)
    lines = words(
        accuracy_against_cost(spec, [replace(summaries[0], mean_confirm_cost=dear), *summaries[1:]], tmp_path / "log")
    ).splitlines()
    assert {"20", "100", "1000"} <= set(lines)


def test_equal_pictures_are_equal_files(tmp_path, study):
    spec, records = study
    _, first = learning_curves(spec, records, tmp_path / "first")
    _, second = learning_curves(spec, records, tmp_path / "second")
    assert first.read_bytes() == second.read_bytes()


def test_colours_can_be_told_apart_without_red_or_green_vision():
    # Dichromat simulation in linear RGB of Viénot, Brettel and Mollon, Color Research and Application 24 (1999) 243.
    blind = {
        "protanope": [[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]],
        "deuteranope": [[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]],
    }
    linear = np.array(
        [[((c + 0.055) / 1.055) ** 2.4 if c > 0.04045 else c / 12.92 for c in to_rgb(x)] for x in COLOURS]
    )
    for matrix in (np.eye(3), *map(np.array, blind.values())):
        seen = np.clip(linear @ matrix.T, 0, 1) ** (1 / 2.2)
        distances = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
        assert distances[~np.eye(len(COLOURS), dtype=bool)].min() > 0.1
