from __future__ import annotations

import fcntl
import json
import os
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from fabricated_study import RANDOM, STEM, WHOLE, YAML, make_spec, make_trials

from studytool.errors import StudytoolError
from studytool.results import Outcome, TrialRecord, to_dict
from studytool.spec import StudySpec
from studytool.study import heartbeat
from studytool.study.heartbeat import DRIVER
from studytool.study.ledger import Ledger
from studytool.study.records import write_state
from studytool.study.status import StudyStatus, status_dict, status_lines, study_status
from studytool.study.storage import this_driver

PRICED = YAML + "resources: {price_per_device_hour: 3.6, currency: EUR, gpu: 0, cpu: 1, trials_at_once: 1}\n"


def put(spec: StudySpec, records: list[TrialRecord]) -> None:
    (spec.folder / "trials").mkdir(parents=True, exist_ok=True)
    for record in records:
        folder = spec.folder / "trials" / record.trial_id
        folder.mkdir(exist_ok=True)
        write_state(folder / "record.json", to_dict(record))


@pytest.fixture
def spec(tmp_path: Path) -> StudySpec:
    return make_spec(tmp_path, PRICED)


def arm(status: StudyStatus, name: str):
    return next(arm for arm in status.arms if arm.arm == name)


def test_a_finished_study(spec: StudySpec):
    records = [record for _, record in make_trials(spec)]
    put(spec, records)
    status = study_status(spec)
    assert status.state == "finished"
    assert status.trials_left == 0
    assert status.best_arm == WHOLE
    spent = sum(record.cost.device_seconds for record in records)
    assert status.device_seconds_spent == pytest.approx(spent)
    assert status.money_spent == pytest.approx(spent / 1000)
    assert status.money_left == 0.0
    assert status.device_seconds_left == 0.0
    one = arm(status, RANDOM)
    assert (one.search_ended, one.search_planned, one.confirm_ended, one.confirm_planned) == (4, 4, 3, 3)
    assert one.failed == 1
    lines = status_lines(status)
    assert lines[0].startswith("fabricated: finished, 0 trials left")
    assert "left: nothing" in lines
    assert sum(" *  " in line for line in lines) == 1


def test_an_interrupted_study_knows_what_is_left_and_what_it_will_take(spec: StudySpec):
    records = [record for trial, record in make_trials(spec) if trial.phase == "search"]
    cut = replace(records[0], outcome=None, epochs=records[0].epochs[:2])
    put(spec, [cut, *records[1:]])
    status = study_status(spec)
    assert status.state == "interrupted"
    assert status.trials_left == 1 + 3 * len(spec.list_arms())
    running = arm(status, records[0].arm).running
    assert [(trial.trial_id, trial.epochs, trial.most_epochs) for trial in running] == [(cut.trial_id, 2, 6)]
    assert running[0].best == cut.epochs[-1].best_value
    assert status.wall_seconds_left is not None
    # Seconds per epoch by hand: 4 with nothing frozen, 3 with the stem frozen (and 0.02 to wait for data).
    confirm = {RANDOM: 3 * 6 * 4.02, WHOLE: 3 * 6 * 4.02, STEM: 3 * 6 * 3.02}
    assert status.wall_seconds_left > sum(confirm.values()) * 0.98
    assert status.wall_seconds_left < sum(confirm.values()) * 1.02 + 6 * 4.02
    assert status.money_left == pytest.approx(status.device_seconds_left / 1000)
    assert any(line.startswith(f"was cut short: {cut.trial_id}, epoch 2 of 6 done") for line in status_lines(status))


def test_a_running_study_is_known_by_its_lock_which_is_left_alone(spec: StudySpec):
    records = [record for _, record in make_trials(spec)][:1]
    put(spec, [replace(records[0], outcome=None, epochs=records[0].epochs[:1])])
    with (spec.folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status = study_status(spec)
    assert status.state == "running"
    assert any(line.startswith("runs: ") for line in status_lines(status))
    assert study_status(spec).state == "interrupted"


def test_a_driver_on_another_machine_is_known_by_its_sign_of_life(spec: StudySpec):
    records = [record for _, record in make_trials(spec)][:1]
    put(spec, [replace(records[0], outcome=None, epochs=records[0].epochs[:1])])
    written = time.time() - 90
    os.utime(spec.folder / "trials" / records[0].trial_id / "record.json", (written, written))
    sign = spec.folder / DRIVER
    sign.write_text("node7, process 12")
    status = study_status(spec)
    assert status.state == "running"
    assert status.problems == ()
    assert re.match(
        r"fabricated: running on node7, process 12, last epoch (9\d s|1\.\d min|\d+ min) ago, ", status_lines(status)[0]
    )
    os.utime(sign, (written, written))
    status = study_status(spec)
    assert status.state == "interrupted"
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(written))
    assert f"interrupted (no sign of life from node7, process 12 since {since})" in status_lines(status)[0]


def test_a_driver_of_this_machine_that_was_killed_is_known_at_once(spec: StudySpec):
    put(spec, [replace(record, outcome=None) for _, record in make_trials(spec)][:1])
    (spec.folder / DRIVER).write_text(this_driver())
    assert study_status(spec).state == "interrupted"


def test_a_driver_gives_signs_of_life_until_it_is_done(spec: StudySpec, monkeypatch):
    monkeypatch.setattr(heartbeat, "RENEW_SECONDS", 0.05)
    ledger = Ledger(spec, "data")
    sign = spec.folder / DRIVER
    assert sign.read_text() == this_driver()
    os.utime(sign, (0, 0))
    for _ in range(200):
        if sign.stat().st_mtime > 0:
            break
        time.sleep(0.05)
    assert time.time() - sign.stat().st_mtime < 60
    ledger.close()
    assert not sign.exists()


def test_the_status_as_json(spec: StudySpec):
    put(spec, [record for _, record in make_trials(spec)])
    status = study_status(spec)
    again = json.loads(json.dumps(status_dict(status), allow_nan=False))
    assert again["best_arm"] == WHOLE
    assert [one["arm"] for one in again["arms"]] == [one.name for one in spec.list_arms()]
    assert again["currency"] == "EUR"


def test_the_best_so_far_is_that_of_trials_that_did_not_fail(spec: StudySpec):
    records = [record for trial, record in make_trials(spec) if trial.arm == STEM and trial.phase == "search"]
    put(spec, records)
    best = max(r.last.best_value for r in records if r.outcome is Outcome.COMPLETE)
    assert arm(study_status(spec), STEM).best == pytest.approx(best)
    assert arm(study_status(spec), RANDOM).best is None


def test_nothing_was_run_yet(spec: StudySpec):
    with pytest.raises(StudytoolError, match="nothing of the study fabricated has been run yet"):
        study_status(spec)
