"""A study in MLflow's own pages, as a user sees it: in a real browser, from a real server."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fabricated_study import YAML, make_manifest, make_spec, make_trials
from mlflow_server import free_port, server

from studytool.report.compare import summarize_arms
from studytool.report.table import plain_text
from studytool.study.tracking import Tracker
from studytool.study.tracking.store import open_client

pytestmark = [pytest.mark.end_to_end, pytest.mark.slow]

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
# No service of the browser's own may look for the network; the sandbox does not start for root in a container.
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--window-size=1600,1400",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
WAIT_SECONDS = 90


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A whole study in an SQLite store; its spec and the run ids by name."""
    monkeypatch.chdir(tmp_path)
    spec = make_spec(tmp_path)
    trials = make_trials(spec)
    with Tracker("sqlite:///mlflow.db", spec) as tracker:
        tracker.open_study(YAML, {"version.torch": "2.15.0"}, make_manifest(tmp_path))
        tracker.catch_up([record for _, record in trials])
        summaries = summarize_arms(spec, [record for _, record in trials])
        for summary in summaries:
            tracker.close_arm(summary)
        tracker.close_study(plain_text(summaries, spec), "COMPLETE")
    runs = open_client(tracker.uri).search_runs([tracker.experiment_id], max_results=1000)
    return spec, tracker.experiment_id, {run.info.run_name: run.info.run_id for run in runs}


@pytest.fixture
def browser(tmp_path) -> Iterator:
    if not BROWSER or not DRIVER:
        pytest.skip("no chromium and chromedriver on the PATH: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'browser'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def test_every_arm_is_found_in_the_run_list_and_on_the_comparison_page(study, browser, tmp_path):
    spec, experiment, run_ids = study
    arms = [arm.name for arm in spec.list_arms()]
    port = free_port()
    with server(tmp_path, port):
        address = f"http://127.0.0.1:{port}/#"

        browser.get(f"{address}/experiments/{experiment}/runs")
        wait_for_text(browser, ["matching runs", "fabricated"])
        expand(browser, "fabricated")
        wait_for_text(browser, arms)
        expand(browser, arms[0])
        wait_for_text(browser, [f"search-000 {arms[0]}", f"confirm-001-seed-2 {arms[0]}"])
        keep_picture(browser, tmp_path / "runs.png")

        chosen = json.dumps([run_ids[arm] for arm in arms])
        browser.get(f'{address}/compare-runs?runs={chosen}&experiments=["{experiment}"]')
        text = wait_for_text(browser, [f"Comparing {len(arms)} Runs", *arms, "cost/device_seconds", "kinetics400"])
        assert text.count("r2plus1d_18.random.none") >= 2, "an arm's name stands in its run and in its parameters"
        keep_picture(browser, tmp_path / "comparison.png")

        browser.get(f"{address}/experiments/{experiment}/runs/{run_ids['fabricated']}")
        wait_for_text(browser, ["mean and interval", "chosen by validation"])
        keep_picture(browser, tmp_path / "study.png")

        assert severe_errors(browser) == []


def test_the_runs_of_the_quickstart_can_be_compared(browser, tmp_path):
    """On the store that `studytool run search_spaces/quickstart.yaml` has left, as a newcomer would look at it."""
    if "STUDYTOOL_QUICKSTART" not in os.environ:
        pytest.skip("set STUDYTOOL_QUICKSTART to the folder of the mlflow.db that the quickstart has written")
    folder = Path(os.environ["STUDYTOOL_QUICKSTART"])
    client = open_client(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("quickstart").experiment_id
    runs = client.search_runs([experiment], filter_string="tags.`studytool.kind` = 'arm'")
    arms = {run.data.tags["studytool.arm"]: run.info.run_id for run in runs}
    assert len(arms) == 3
    port = free_port()
    with server(folder, port):
        address = f"http://127.0.0.1:{port}/#"
        browser.get(f"{address}/experiments/{experiment}/runs")
        wait_for_text(browser, ["matching runs", "quickstart"])
        expand(browser, "quickstart")
        wait_for_text(browser, list(arms))
        keep_picture(browser, tmp_path / "quickstart-runs.png")
        browser.get(f'{address}/compare-runs?runs={json.dumps(list(arms.values()))}&experiments=["{experiment}"]')
        wait_for_text(browser, ["Comparing 3 Runs", *arms, "cost/device_seconds"])
        keep_picture(browser, tmp_path / "quickstart-comparison.png")
        assert severe_errors(browser) == []


def wait_for_text(browser, words: list[str]) -> str:
    """The page's text as soon as it holds all the words."""
    text = ""
    for _ in range(2 * WAIT_SECONDS):
        text = browser.find_element("tag name", "body").text
        if all(word in text for word in words):
            return text
        time.sleep(0.5)
    raise AssertionError(f"the page never showed {[word for word in words if word not in text]}:\n{text}")


PRESS_PLUS = """
    const cells = [...document.querySelectorAll('.ag-row [col-id*="Run Name"]')];
    const button = cells.find(cell => cell.querySelector("a")?.textContent === arguments[0])?.querySelector("button");
    button?.click();
    return Boolean(button);
"""


def expand(browser, run_name: str) -> None:
    """Press the plus sign before a run's name, as soon as it is there."""
    for _ in range(2 * WAIT_SECONDS):
        if browser.execute_script(PRESS_PLUS, run_name):
            return
        time.sleep(0.5)
    raise AssertionError(f"no row of the run list is named {run_name}")


def keep_picture(browser, path: Path) -> None:
    assert browser.save_screenshot(str(path))
    assert path.stat().st_size > 20_000, "a page with something on it"


def severe_errors(browser) -> list[str]:
    """What the console calls severe, but for MLflow's question who is logged in: 404 where nobody has to log in."""
    entries = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    return [entry["message"] for entry in entries if "/mlflow/users/current - " not in entry["message"]]
