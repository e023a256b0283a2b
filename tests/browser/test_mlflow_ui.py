"""A study in MLflow's own pages, as a user sees it: in a real browser, from a real server."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from fabricated_study import YAML, make_manifest, make_spec, make_trials
from mlflow_server import free_port

from studytool.report.compare import summarize_arms
from studytool.report.table import plain_text
from studytool.study.folder import keep_study
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
    keep_study(spec, {})
    with Tracker(spec.tracking.uri, spec) as tracker:
        tracker.open_study(YAML, {"version.torch": "2.15.0"}, make_manifest(tmp_path))
        tracker.catch_up([record for _, record in trials])
        summaries = summarize_arms(spec, [record for _, record in trials])
        for summary in summaries:
            tracker.close_arm(summary)
        tracker.close_study(plain_text(summaries, spec), "COMPLETE")
    runs = open_client(tracker.uri).search_runs([tracker.experiment_id], max_results=1000)
    return spec, tracker.experiment_id, {run.info.run_name: run.info.run_id for run in runs}


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Where screenshots are kept: the folder in STUDYTOOL_ARTIFACTS, or the test's own."""
    folder = Path(os.environ.get("STUDYTOOL_ARTIFACTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


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


def test_every_arm_is_found_in_the_run_list_and_on_the_saved_comparison(study, browser, tmp_path, pictures):
    spec, experiment, run_ids = study
    arms = [arm.name for arm in spec.list_arms()]
    with studytool_ui(tmp_path, str(spec.folder)) as (process, address, links):
        assert links["runs of fabricated"] == f"{address}/#/experiments/{experiment}/runs"
        browser.get(links["runs of fabricated"])
        wait_for_text(browser, ["matching runs", "fabricated"])
        expand(browser, "fabricated")
        wait_for_text(browser, arms)
        expand(browser, arms[0])
        wait_for_text(browser, [f"search-000 {arms[0]}", f"confirm-001-seed-2 {arms[0]}"])
        keep_picture(browser, pictures / "runs.png")

        browser.get(links["its arms compared"])
        text = wait_for_text(browser, [f"Comparing {len(arms)} Runs", *arms, "cost/device_seconds", "kinetics400"])
        assert text.count("r2plus1d_18.random.none") >= 2, "an arm's name stands in its run and in its parameters"
        keep_picture(browser, pictures / "comparison.png")

        browser.get(f"{address}/#/experiments/{experiment}/runs/{run_ids['fabricated']}")
        wait_for_text(browser, ["mean and interval", "chosen by validation"])
        keep_picture(browser, pictures / "study.png")

        assert severe_errors(browser) == []
        assert listening_addresses(process.pid) == {"127.0.0.1"}, "nobody else may look"


def test_nothing_is_left_behind_and_a_taken_port_is_no_obstacle(study, tmp_path):
    spec, _, _ = study
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # somebody else has it: as good
            taken.bind(("127.0.0.1", 5000))
            taken.listen()
        with studytool_ui(tmp_path, str(spec.folder), port=None) as (process, address, _):
            assert address != "http://127.0.0.1:5000"
            family = psutil.Process(process.pid).children(recursive=True)
            assert family
            process.send_signal(signal.SIGINT)  # Ctrl-C
            assert process.wait(60) == 0
    gone, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []
    assert len(gone) == len(family)


def test_the_runs_of_the_quickstart_can_be_compared(browser, tmp_path, pictures):
    """On the store that `studytool run search_spaces/quickstart.yaml` has left, as a newcomer would look at it."""
    if "STUDYTOOL_QUICKSTART" not in os.environ:
        pytest.skip("set STUDYTOOL_QUICKSTART to the folder of the studies/ and mlflow.db of the quickstart")
    folder = Path(os.environ["STUDYTOOL_QUICKSTART"])
    arms = [f"r2plus1d_tiny.{init}" for init in ("random", "shuffled", "motion")]
    with studytool_ui(folder, str(folder / "studies" / "quickstart")) as (_, _, links):
        browser.get(links["runs of quickstart"])
        wait_for_text(browser, ["matching runs", "quickstart"])
        expand(browser, "quickstart")
        wait_for_text(browser, arms)
        keep_picture(browser, pictures / "quickstart-runs.png")
        browser.get(links["its arms compared"])
        wait_for_text(browser, ["Comparing 3 Runs", *arms, "cost/device_seconds"])
        keep_picture(browser, pictures / "quickstart-comparison.png")
        assert severe_errors(browser) == []


@contextmanager
def studytool_ui(folder: Path, study: str, *, port: int | None = 0):
    """`studytool ui`: its process, the address it printed and the links by what it calls them. `port` 0: a free one."""
    command = [sys.executable, "-m", "studytool.cli", "ui", study]
    if port is not None:
        command += ["--port", str(free_port())]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        lines: list[str] = []
        while not lines or lines[-1] != "Ctrl-C ends it":
            line = process.stdout.readline()
            assert line, process.stderr.read()
            lines.append(line.rstrip("\n"))
        yield process, lines[0], dict(line.split(": ", 1) for line in lines[1:-1])
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def listening_addresses(pid: int) -> set[str]:
    """The addresses at which a process or one of its children waits to be called."""
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return {c.laddr.ip for p in family for c in p.net_connections(kind="inet") if c.status == psutil.CONN_LISTEN}


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
