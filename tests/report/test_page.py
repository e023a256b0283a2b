from __future__ import annotations

import csv
import re
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest
from fabricated_study import RANDOM, STEM, WHOLE, make_spec, make_trials

from studytool.report import sections
from studytool.report.page import write_report
from studytool.report.sections import StudyResults
from studytool.report.winnersections import before_and_after, right_and_wrong
from studytool.results import Outcome
from studytool.training.predictions import read_test_predictions

POINTS = ("arms", "claims", "cost", "curves", "search", "mistakes", "features", "time", "made")


class Page(HTMLParser):
    """The text, ids and addresses of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self._silent = 0
        self.feed(html)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self._silent += tag == "style"
        for name, value in attributes:
            if name == "id" and tag == "section":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "action", "data"):
                self.addresses.append(value)

    def handle_endtag(self, tag):
        self._silent -= tag == "style"

    def handle_data(self, data):
        if not self._silent:
            self.words.append(data)


@pytest.fixture
def fabricated(tmp_path) -> StudyResults:
    spec = make_spec(tmp_path)
    return StudyResults(spec, [record for _, record in make_trials(spec)], spec.folder)


def written(results: StudyResults, **options) -> Page:
    return Page(write_report(results, **options).page.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def trained_page(trained) -> Page:
    return written(trained)


@pytest.mark.slow
def test_a_trained_study_has_something_at_all_nine_points(trained, trained_page):
    page = trained_page
    assert [name for name in page.ids if name in POINTS] == list(POINTS)
    figures = {path.stem for path in (trained.folder / "figures").glob("*.svg")}
    expected = {"differences", "accuracy_against_cost", "accuracy_against_operations", "curves", "curves_on_time"}
    expected |= {"search", "confusion", "tomograms", "mistakes", "features", "time"}
    assert expected <= figures
    assert {path.stem for path in (trained.folder / "figures").glob("*.png")} == figures
    assert page.tags.count("svg") == len(figures)
    for name in figures:
        pixels = matplotlib.image.imread(trained.folder / "figures" / f"{name}.png")
        assert np.unique(pixels).size > 10, f"{name} is empty"
    for arm in trained.spec.list_arms():
        assert arm.name in page.text
    for word in ("silhouette", "adjusted Rand index", "precision", "torch 2.15.0", "studytool run study.yaml"):
        assert word in page.text
    assert "same signal-to-noise ratio, 2." in page.text
    assert "energy" in page.text
    assert "not measured" in page.text


@pytest.mark.slow
def test_the_page_needs_nothing_from_elsewhere(trained, trained_page):
    page = trained_page
    outside = [a for a in page.addresses if not a.startswith(("#", "data:"))]
    assert outside == []
    assert not {"script", "link", "iframe", "img"} & {*page.tags} - {"link"}
    assert page.tags.count("link") == 1  # the icon, empty, so that no browser asks a server for one
    html = (trained.folder / "report.html").read_text(encoding="utf-8")
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)


@pytest.mark.slow
def test_kept_predictions_reproduce_the_recorded_test_scores(trained):
    for record in trained.records:
        kept = read_test_predictions(trained.trial_folder(record.trial_id))
        if record.phase == "search":
            assert kept is None
            continue
        confusion = np.zeros((3, 3), dtype=int)
        np.add.at(confusion, (kept.labels, kept.probabilities.argmax(axis=1)), 1)
        assert confusion.tolist() == [list(row) for row in record.test.confusion]
        np.testing.assert_array_equal(trained.dataset.rows("test"), kept.rows)


@pytest.mark.parametrize("left", ["nothing", "one unfinished trial", "the search"])
def test_a_study_in_any_state_has_a_page_and_says_what_is_missing(fabricated, left):
    records = list(fabricated.records)
    some = {
        "nothing": [],
        "one unfinished trial": [replace(records[0], outcome=None, epochs=records[0].epochs[:1])],
        "the search": [r for r in records if r.phase == "search"],
    }[left]
    page = written(replace(fabricated, records=some))
    assert [name for name in page.ids if name in POINTS] == list(POINTS)
    assert "No confirm run has finished yet" in page.text
    assert "not finished" in page.text
    assert len(list(csv.DictReader((fabricated.folder / "trials.csv").open()))) == len(some)


def test_a_point_that_breaks_does_not_cost_the_others(fabricated, monkeypatch):
    def fail(*_: object) -> None:
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(sections, "curves", fail)
    page = written(fabricated)
    assert [name for name in page.ids if name in POINTS] == list(POINTS)
    assert "This cannot be shown: ZeroDivisionError: on purpose." in page.text


def test_the_answer_comes_first_every_arm_is_named_and_no_message_can_break_the_page(fabricated):
    failed = next(r for r in fabricated.records if r.outcome is Outcome.FAILED)
    odd = replace(failed, message="<script>alert(1)</script> & more")
    results = replace(fabricated, records=[odd if r is failed else r for r in fabricated.records])
    page = written(replace(results, environment={"command": "<b>run</b>"}))
    assert "script" not in page.tags
    assert "<script>alert(1)</script> & more" in page.text
    assert "<b>run</b>" in page.text
    assert page.text.index("balanced accuracy, 27.7 points") < page.text.index("Which arm is best")
    for arm in (RANDOM, WHOLE, STEM):
        assert arm in page.text


@pytest.mark.slow
def test_without_its_dataset_or_trials_a_study_still_has_a_report(trained, tmp_path):
    alone = replace(trained, dataset=None)
    assert "The dataset is not on this machine" in right_and_wrong(alone, tmp_path).missing
    assert "The dataset is not on this machine" in before_and_after(alone, tmp_path).missing
    moved = replace(trained, folder=tmp_path / "elsewhere")
    assert "predictions on the test split were not kept" in right_and_wrong(moved, tmp_path).missing
    assert "The features could not be computed" in before_and_after(moved, tmp_path).missing
