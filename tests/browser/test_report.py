"""The report of a study as a reader sees it: opened from the disk in a real browser."""

from __future__ import annotations

import pytest
from fabricated_study import CLASSES, make_spec, make_trials
from test_mlflow_ui import browser, keep_picture, severe_errors  # noqa: F401 - `browser` is a fixture

from studytool.report.page import write_report
from studytool.report.sections import StudyResults

pytestmark = [pytest.mark.end_to_end, pytest.mark.slow]


def test_the_report_opens_without_a_network_and_shows_every_arm(browser, tmp_path):  # noqa: F811
    spec = make_spec(tmp_path)
    results = StudyResults(spec, [record for _, record in make_trials(spec)], spec.folder)
    report = write_report(results)

    browser.get(report.page.as_uri())
    text = browser.find_element("tag name", "body").text.replace("\n", " ")
    assert report.answer.headline in text
    first_table = browser.find_element("css selector", "#arms table").text.replace("\n", "").replace(" ", "")
    for arm in spec.list_arms():
        assert arm.name in first_table
    assert len(browser.find_elements("css selector", "section[id] h2")) == 10  # nine points and the words
    for drawing in browser.find_elements("css selector", "figure svg"):
        assert drawing.size["width"] > 300
        assert drawing.size["height"] > 50
    assert f"class {len(CLASSES) - 1}" in text
    # Nothing sticks out to the right, neither on a large screen nor on a small one (tables scroll in their own box).
    for width in (1600, 700):
        browser.set_window_size(width, 1000)
        assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    browser.set_window_size(1200, 1400)
    keep_picture(browser, tmp_path / "report.png")
    browser.get(report.page.as_uri() + "#time")
    keep_picture(browser, tmp_path / "report-time.png")
    assert severe_errors(browser) == []
