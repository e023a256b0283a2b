from __future__ import annotations

import json

import pytest
from synthetic_study import STUDY, Driver

from studytool.errors import StudytoolError
from studytool.study.ledger import Ledger, read_records


def test_records_come_back_as_they_were_written(driver):
    written = driver.run()
    again = Ledger(driver.spec, "data")
    assert again.records == written.records
    assert again.uid == written.uid
    again.close()
    found = {r.trial_id: r for r in read_records(driver.spec.folder)}
    assert found == {r.trial_id: r for r in written.records}


def test_a_study_is_run_by_one_process_at_a_time(driver):
    ledger = Ledger(driver.spec, "data")
    with pytest.raises(StudytoolError, match="already running"):
        Ledger(driver.spec, "data")
    ledger.close()
    Ledger(driver.spec, "data").close()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("max_epochs: 4", "max_epochs: 5", "train.max_epochs = 4, the study file now says 5"),
        ("1e-1]", "1e-2]", "search.space"),
        ("name: small", "seed: 3\nname: small", "seed = 0, the study file now says 3"),
    ],
)
def test_changed_settings_ask_for_another_name(driver, tmp_path, old, new, words):
    driver.run()
    with pytest.raises(StudytoolError) as caught:
        Driver(tmp_path, STUDY.replace(old, new)).run()
    assert words in str(caught.value)
    assert "another name" in str(caught.value)


def test_changed_data_asks_for_another_name(driver, tmp_path):
    driver.run()
    with pytest.raises(StudytoolError, match='data = "data", the study file now says "other data"'):
        Driver(tmp_path, fingerprint="other data").run()


def test_a_damaged_record_is_read_from_the_generation_before(driver):
    records = driver.run().records
    folder = driver.spec.folder / "trials"
    for path in folder.glob("*/record.json"):
        path.write_text(path.read_text()[:-40])
    recovered = Ledger(driver.spec, "data").records
    assert {r.trial_id for r in recovered} == {r.trial_id for r in records}
    # The generation before the end of a trial has all its epochs but not yet its outcome.
    assert [r.epochs for r in recovered] == [r.epochs for r in records]


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
    with pytest.raises(StudytoolError, match=r"study\.json: missing, although .* holds results"):
        Ledger(driver.spec, "data")


def test_a_later_format_is_refused(driver):
    Ledger(driver.spec, "data").close()
    path = driver.spec.folder / "study.json"
    from studytool.study.ledger import _digest

    content = {**json.loads(path.read_text())["content"], "format": 99}
    path.write_text(json.dumps({"sha256": _digest(content), "content": content}))
    with pytest.raises(StudytoolError, match="format 99 is not known"):
        Ledger(driver.spec, "data")


def test_the_folder_is_private(driver):
    Ledger(driver.spec, "data").close()
    assert driver.spec.folder.stat().st_mode & 0o077 == 0
