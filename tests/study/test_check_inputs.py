"""What every trial needs may go away while a study runs, as when a disk is unmounted: that is no trial's fault."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from reliability.writes import particles
from rich.console import Console
from synthetic_study import STUDY

from studytool.data.shards import Dataset, open_dataset, write_dataset
from studytool.errors import StudytoolError
from studytool.spec import StudySpec, load_study
from studytool.study.director import Director
from studytool.study.ledger import Ledger
from studytool.study.run import _without_damage, check_inputs
from studytool.study.signals import Signals
from studytool.study.slots import Slots

GOES_ON = "the study stopped and lost nothing: put right what its trials need, and the same command goes on"


@pytest.fixture
def begun(tmp_path: Path) -> tuple[StudySpec, Dataset]:
    write_dataset(particles(0), tmp_path / "data", dtype="float16", provenance={}, volumes_per_shard=8)
    (tmp_path / "a.yaml").write_text(STUDY.replace("data/small", str(tmp_path / "data")))
    spec = load_study(tmp_path / "a.yaml", [f"output={tmp_path / 'studies'}"])
    dataset = open_dataset(tmp_path / "data")
    check_inputs(spec, dataset)
    return spec, dataset


def _unmount(folder: Path) -> None:
    folder.rename(folder.with_name("gone"))


def _cut_a_shard(folder: Path) -> None:
    with (folder / "part-00000.parquet").open("r+b") as file:
        file.truncate(100)


def _flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "part-00001.parquet").read_bytes())
    content[5000] ^= 1
    (folder / "part-00001.parquet").write_bytes(content)


def _write_other_data(folder: Path) -> None:
    shutil.rmtree(folder)
    write_dataset(particles(1), folder, dtype="float16", provenance={}, volumes_per_shard=8)


@pytest.mark.parametrize("harm", [_unmount, _cut_a_shard, _flip_a_bit, _write_other_data])
def test_data_that_are_no_longer_what_the_study_began_with_are_named_in_one_line(begun, harm):
    spec, dataset = begun
    harm(dataset.folder)
    with pytest.raises(StudytoolError, match=GOES_ON) as caught:
        check_inputs(spec, dataset)
    assert str(caught.value).startswith(str(dataset.folder))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("there", [True, False])
def test_a_trial_that_breaks_when_its_data_are_gone_does_not_fail(begun, there):
    """The study ends instead, with the trial to be run again."""
    from studytool.study.tuning import _Bridge, _Stop

    spec, dataset = begun
    ledger = Ledger(spec, dataset.fingerprint)
    director = Director(spec, ledger, dataset.fingerprint)
    bridge = _Bridge(
        director,
        ledger.trial_folder,
        Slots(count=1, cpu=1, gpu=0.0),
        Signals(),
        lambda: check_inputs(spec, dataset),
        None,
        None,
    )
    bridge.ask("ray-starts-a-worker")
    assert bridge.tell("ray-starts-a-worker", {"ready": True})
    bridge.ask("ray-0")
    broken = {"failure": "part-00000.parquet: cannot be read", "cause": "trial", "details": "", "device_seconds": 0.0}
    if there:
        assert bridge.tell("ray-0", broken)
        assert ledger.records[0].outcome == "FAILED"
    else:
        _unmount(dataset.folder)
        with pytest.raises(_Stop) as caught:
            bridge.tell("ray-0", broken)
        assert GOES_ON in str(caught.value.error)
        assert ledger.records[0].outcome is None
    ledger.close()


def test_what_is_left_of_damaged_data_is_not_made_anew_under_a_running_study(begun):
    spec, dataset = begun
    _flip_a_bit(dataset.folder)
    skipping = spec.model_copy(update={"data": spec.data.model_copy(update={"on_damage": "skip"})})
    told, rest, _ = _without_damage(skipping, Console(quiet=True))
    assert told.data.leave_out == ("part-00001.parquet",)
    files = {path: path.stat().st_ino for path in rest.iterdir()}
    assert _without_damage(skipping, Console(quiet=True))[1] == rest
    assert {path: path.stat().st_ino for path in rest.iterdir()} == files
