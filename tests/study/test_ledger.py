from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
from synthetic_study import STUDY, Driver

from studytool.errors import StudytoolError
from studytool.study.budget import device_seconds_spent
from studytool.study.ledger import Ledger, set_aside, take_lock
from studytool.study.records import new_record, read_record, read_records
from studytool.study.storage import this_driver

LEDGERS = Path(__file__).with_name("ledgers")


def test_records_come_back_as_they_were_written(driver):
    written = driver.run()
    again = Ledger(driver.spec, "data")
    assert again.records == written.records
    assert again.uid == written.uid
    again.close()
    found = {r.trial_id: r for r in read_records(driver.spec.folder)}
    assert found == {r.trial_id: r for r in written.records}


def test_records_are_in_the_order_of_their_numbers_however_many_digits_these_have(driver):
    """The folder of trial 1000 comes before that of trial 101."""
    [arm] = [arm for arm in driver.spec.list_arms() if arm.name == "none"]
    ledger = Ledger(driver.spec, "data")
    for number in (1000, 101, 2):
        trial = driver.spec.trial(arm, {"learning_rate": 1e-3}, phase="search", number=number, seed=0)
        ledger.put(new_record(trial, "data"))
    ledger.close()
    for records in (ledger.records, ledger.of_arm("none"), read_records(driver.spec.folder)):
        assert [record.number for record in records] == [2, 101, 1000]


def test_totals_follow_every_change_and_are_the_same_when_the_study_is_taken_up_again(driver):
    ledger = driver.run(kill_after=31)
    again = Ledger(driver.spec, "data")
    again.close()
    records = ledger.records
    assert [r for r in records if r.outcome is None] == list(ledger.without_outcome) != []
    assert [r for arm in ("backbone", "none") for r in ledger.of_arm(arm)] == sorted(records, key=lambda r: r.arm)
    for totals in (ledger.totals, again.totals):
        assert totals.device_seconds == device_seconds_spent(records)
        assert totals.epochs == sum(len(r.epochs) for r in records) == 31
        assert totals.begun == sum(r.same_as is None for r in records)


def test_a_study_is_run_by_one_process_at_a_time(driver):
    ledger = Ledger(driver.spec, "data")
    with pytest.raises(StudytoolError, match="already running"):
        Ledger(driver.spec, "data")
    ledger.close()
    Ledger(driver.spec, "data").close()


@pytest.mark.parametrize("again", [False, True], ids=["moved", "moved and begun again"])
def test_a_folder_that_is_moved_while_its_study_runs_is_not_continued_in_its_place(driver, tmp_path, again):
    ledger = driver.run(kill_after=5)
    ledger = Ledger(driver.spec, "data")
    ledger.folder.rename(tmp_path / "elsewhere")
    other = Ledger(driver.spec, "data") if again else None
    with pytest.raises(StudytoolError, match="was moved, removed or replaced while the study ran"):
        ledger.put(ledger.records[0])
    ledger.close()
    assert not list(driver.spec.folder.glob("trials/*/record.json"))
    if other is not None:
        assert other.put(ledger.records[0]) == ledger.records[0]
        other.close()


def test_a_lock_taken_while_the_folder_is_put_aside_is_one_of_the_new_folder(driver, monkeypatch):
    """Between opening the lock and holding it another process may put the study aside and begin it anew."""
    Ledger(driver.spec, "data").close()
    folder, flock = driver.spec.folder, fcntl.flock

    def put_aside_first(handle, how):
        monkeypatch.undo()
        folder.rename(folder.with_name("aside"))
        folder.mkdir()
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", put_aside_first)
    with take_lock(folder) as lock:
        assert os.path.samestat(os.fstat(lock.fileno()), (folder / ".lock").stat())


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("max_epochs: 4", "max_epochs: 5", "train.max_epochs = 4, the study file now says 5"),
        (
            "1e-1]",
            "1e-2]",
            'search.learning_rate = {"log_uniform": [0.0001, 0.1]}, the study file now says '
            '{"log_uniform": [0.0001, 0.01]} (a range may only grow)',
        ),
        ("log_uniform: [1e-4, 1e-1]", "uniform: [1e-4, 1e-1]", 'now says {"uniform": [0.0001, 0.1]}'),
        ("  trials_per_arm", "  weight_decay: {uniform: [0.0, 0.1]}\n  trials_per_arm", "search.weight_decay = null"),
        ("name: small", "seed: 3\nname: small", "seed = 0, the study file now says 3"),
    ],
)
def test_changed_settings_ask_for_another_name(driver, tmp_path, old, new, words):
    driver.run()
    with pytest.raises(StudytoolError) as caught:
        Driver(tmp_path, STUDY.replace(old, new)).run()
    assert words in str(caught.value)
    assert "another name" in str(caught.value)
    assert "--new" in str(caught.value)


def test_in_a_wider_range_only_further_trials_run_and_old_ones_count(driver, tmp_path):
    before = driver.run().records
    text = STUDY.replace("1e-4, 1e-1", "1e-5, 1.0").replace("trials_per_arm: 6", "trials_per_arm: 8")
    wider = Driver(tmp_path, text)
    after = {r.trial_id: r for r in wider.run().records}
    assert [after[r.trial_id] for r in before] == list(before)
    assert {trial_id for trial_id, _ in wider.epochs_run} == {*after} - {r.trial_id for r in before}
    searched = [trial_id for trial_id in after if "search" in trial_id]
    assert len(searched) == 2 * 8
    # and back again: what was drawn from the wide range could not have been drawn from the narrow one
    with pytest.raises(StudytoolError, match="a range may only grow"):
        driver.run()


def test_more_choices_are_a_wider_range(tmp_path):
    text = STUDY.replace("learning_rate: {log_uniform: [1e-4, 1e-1]}", "learning_rate: {choice: [0.1, 0.01]}")
    first = Driver(tmp_path, text).run().records
    more = Driver(tmp_path, text.replace("[0.1, 0.01]", "[0.1, 0.01, 0.001]").replace("arm: 6", "arm: 9"))
    after = more.run().records
    assert {r.trial_id for r in first} < {r.trial_id for r in after}
    assert 0.001 in {r.parameters["learning_rate"] for r in after}


def test_another_arm_runs_alone(driver, tmp_path):
    before = driver.run().records
    more = Driver(tmp_path, STUDY.replace("[none, backbone]", "[none, backbone, stem]"))
    after = more.run().records
    assert {trial_id.split(".")[0] for trial_id, _ in more.epochs_run} == {"stem"}
    assert {r.trial_id for r in before} < {r.trial_id for r in after}


def test_a_study_begun_anew_keeps_the_old_results_aside(driver):
    before = driver.run()
    (driver.spec.folder / "mlflow").mkdir()
    (driver.spec.folder / "mlflow" / "artifact").touch()
    aside = set_aside(driver.spec)
    assert {r.trial_id: r for r in read_records(aside)} == {r.trial_id: r for r in before.records}
    anew = Ledger(driver.spec, "data")
    assert not anew.records
    assert anew.uid != before.uid
    with pytest.raises(StudytoolError, match="already running"):
        set_aside(driver.spec)
    anew.close()
    # MLflow's store names its files by their path
    assert (driver.spec.folder / "mlflow" / "artifact").exists()
    assert set_aside(driver.spec).name == "small.before-2"


def test_another_version_of_the_program_is_said_and_not_refused(driver):
    Ledger(driver.spec, "data").close()
    path = driver.spec.folder / "study.json"
    _rewrite(path, program="0.0.7")
    ledger = Ledger(driver.spec, "data")
    assert "begun with studytool 0.0.7" in ledger.notes[0]
    ledger.close()


@pytest.mark.parametrize("folder", sorted(LEDGERS.glob("format-*/*")), ids=lambda path: path.parent.name)
def test_ledgers_of_every_released_format_are_opened_and_continued(tmp_path, folder):
    """`ledgers/format-N/small` was written by the program that had format N, and killed after five epochs."""
    shutil.copytree(folder, tmp_path / "studies" / "small")
    text = STUDY.replace("arm: 6", "arm: 3").replace("[none, backbone]", "[none]").replace("epochs: 4", "epochs: 2")
    driver = Driver(tmp_path, text.replace("seeds: 2", "seeds: 1"))
    before = {r.trial_id: r for r in read_records(driver.spec.folder)}
    assert sum(r.outcome is not None for r in before.values()) == 3
    after = {r.trial_id: r for r in driver.run().records}
    assert driver.epochs_run == [("none.confirm-000-seed-0", 2)]
    assert [after[t] for t, r in before.items() if r.outcome] == [r for r in before.values() if r.outcome]


def test_changed_data_asks_for_another_name(driver, tmp_path):
    driver.run()
    with pytest.raises(StudytoolError, match=r"other data \(fingerprint data, now other data\)"):
        Driver(tmp_path, fingerprint="other data").run()


def test_a_damaged_record_is_read_from_the_generation_before(driver):
    records = driver.run().records
    folder = driver.spec.folder / "trials"
    for path in folder.glob("*/record.json"):
        path.write_text(path.read_text()[:-40])
    recovered = Ledger(driver.spec, "data").records
    assert recovered == records


def test_the_good_generation_is_kept_when_the_damaged_one_is_written_over(driver):
    ledger = driver.run()
    record = ledger.records[0]
    path = driver.spec.folder / "trials" / record.trial_id / "record.json"
    path.write_bytes(path.read_bytes()[:100])
    again = Ledger(driver.spec, "data")
    again.put(record)
    again.close()
    path.write_bytes(path.read_bytes()[:100])
    assert read_record(path) == record


def test_a_folder_whose_lock_other_machines_do_not_see_is_run_by_one_of_them(driver, monkeypatch):
    for room in ("heartbeat", "storage"):
        monkeypatch.setattr(f"studytool.study.{room}.RENEW_SECONDS", 0.1)
        monkeypatch.setattr(f"studytool.study.{room}.LEASE_SECONDS", 1.0)
    sign = driver.spec.folder / ".driver"
    Ledger(driver.spec, "data").close()
    sign.write_text("another machine, process 1")
    stop = threading.Event()
    alive = threading.Thread(target=lambda: [sign.touch() for _ in iter(lambda: stop.wait(0.1), True)])
    alive.start()
    try:
        with pytest.raises(StudytoolError, match=r"running in another process \(another machine, process 1\)"):
            Ledger(driver.spec, "data")
    finally:
        stop.set()
        alive.join()
    assert sign.read_text() == "another machine, process 1"
    ledger = Ledger(driver.spec, "data")  # it was killed
    assert sign.read_text() == this_driver()
    sign.write_text("another machine, process 2")
    ledger.close()
    assert sign.read_text() == "another machine, process 2"


def test_a_flipped_digit_is_noticed(driver):
    driver.run()
    path = next((driver.spec.folder / "trials").glob("*/record.json"))
    path.write_text(path.read_text().replace('"best_epoch": 1', '"best_epoch": 2', 1))
    path.with_name("record.json.previous").unlink()
    with pytest.raises(StudytoolError, match=r"damaged \(its checksum does not match\)"):
        Ledger(driver.spec, "data")


def test_a_lost_header_is_not_a_new_study(driver):
    driver.run()
    (driver.spec.folder / "study.json").unlink()
    Ledger(driver.spec, "data").close()  # from the generation before it
    for name in ("study.json", "study.json.previous"):
        (driver.spec.folder / name).unlink()
    with pytest.raises(StudytoolError, match=r"study\.json: missing, although .* holds results"):
        Ledger(driver.spec, "data")


def test_a_study_that_has_lost_all_its_trials_is_not_begun_again_in_silence(driver):
    Ledger(driver.spec, "data").close()
    Ledger(driver.spec, "data").close()  # stopped before its first trial: nothing was lost
    shutil.rmtree(driver.run(kill_after=1).folder / "trials")
    with pytest.raises(StudytoolError, match=r"holds no trial, although the study had begun; .* with --new"):
        driver.run()
    set_aside(driver.spec)
    assert driver.run().records


def test_a_later_format_is_refused(driver):
    Ledger(driver.spec, "data").close()
    _rewrite(driver.spec.folder / "study.json", format=99)
    with pytest.raises(StudytoolError, match="format 99 is not known"):
        Ledger(driver.spec, "data")


def test_a_setting_of_a_later_version_is_one_line(driver):
    Ledger(driver.spec, "data").close()
    path = driver.spec.folder / "study.json"
    settings = json.loads(path.read_text())["content"]["settings"]
    _rewrite(path, program="9.0", settings={**settings, "train.sharpness": 1.0})
    with pytest.raises(StudytoolError, match=r"a later studytool \(9.0\), which knows train.sharpness; update"):
        Ledger(driver.spec, "data")


def test_a_record_of_a_later_version_is_one_line(driver):
    driver.run()
    path = min((driver.spec.folder / "trials").glob("*/record.json"))
    _rewrite(path, mood="good")
    with pytest.raises(StudytoolError, match=r"record.json: was written by another version .*'mood'"):
        Ledger(driver.spec, "data")


def _rewrite(path: Path, **changes: object) -> None:
    content = {**json.loads(path.read_text())["content"], **changes}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({"sha256": digest, "content": content}))


def test_the_folder_is_private(driver):
    Ledger(driver.spec, "data").close()
    assert driver.spec.folder.stat().st_mode & 0o077 == 0
