"""An import that was interrupted, killed or ran out of disk, and what the next one makes of it."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time

import pytest
from lab import refused, run, volume, write_mrc

from studytool.data import importing
from studytool.data.shards import verify_dataset
from studytool.errors import DataError


class Stop(KeyboardInterrupt):
    pass


@pytest.fixture
def many(tmp_path):
    for number in range(40):
        write_mrc(tmp_path / "lab" / "ab"[number % 2] / f"p{number:02d}.mrc", volume(number), patch={208: b"\0" * 4})
    return tmp_path / "lab"


SHARDS = {"volumes_per_shard": 8}


def interrupted(source, out, at=32, error=Stop, **changes):
    def stop(done, total):
        if done >= at:
            raise error

    with pytest.raises(error):
        run(source, out, on_progress=stop, **{**SHARDS, **changes})


def converted(monkeypatch):
    """The numbers of the volumes that are converted from now on."""
    numbers = []
    usual = importing._Converter.__call__
    monkeypatch.setattr(
        importing._Converter, "__call__", lambda self, item: (numbers.extend(item[1]), usual(self, item))[1]
    )
    return numbers


def test_an_interrupted_import_goes_on_where_it_stopped(many, tmp_path, monkeypatch):
    whole = run(many, tmp_path / "whole", **SHARDS)
    interrupted(many, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    left = tmp_path / ".out.partial"
    assert sorted(p.name for p in left.glob("*.parquet")) == [f"part-{n:05d}.parquet" for n in range(4)]
    assert not (left / "manifest.json").exists()
    numbers = converted(monkeypatch)
    assert run(many, tmp_path / "out", **SHARDS) == whole
    assert numbers == list(range(32, 40))
    assert verify_dataset(tmp_path / "out") == whole
    assert whole.provenance["oddities"]
    assert next(iter(whole.provenance["oddities"].values()))["files"] == 40
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lab", "out", "whole"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "manifest.json", *(f"part-{n:05d}.parquet" for n in range(5))
    ]  # fmt: skip


def touched(many, tmp_path):
    os.utime(many / "a" / "p00.mrc", (1, 1))


def grown(many, tmp_path):
    path = many / "a" / "p00.mrc"
    state = path.stat()
    path.write_bytes(path.read_bytes() + b"more")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def added(many, tmp_path):
    write_mrc(many / "b" / "p99.mrc", volume(99))


def damaged(many, tmp_path):
    path = tmp_path / ".out.partial" / "part-00001.parquet"
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)


def without_journal(many, tmp_path):
    (tmp_path / ".out.partial" / "journal.json").write_text('{"key"')


@pytest.mark.parametrize("change", [touched, grown, added, damaged, without_journal])
def test_a_changed_source_or_a_damaged_shard_makes_it_start_anew(many, tmp_path, monkeypatch, change):
    interrupted(many, tmp_path / "out")
    change(many, tmp_path)
    numbers = converted(monkeypatch)
    run(many, tmp_path / "out", **SHARDS)
    assert numbers[0] == 0
    assert verify_dataset(tmp_path / "out").num_volumes == len(numbers)


def test_other_settings_make_it_start_anew(many, tmp_path, monkeypatch):
    interrupted(many, tmp_path / "out")
    numbers = converted(monkeypatch)
    manifest = run(many, tmp_path / "out", **SHARDS, invert=True)
    assert numbers[0] == 0
    assert manifest.fingerprint == run(many, tmp_path / "again", **SHARDS, invert=True).fingerprint


def test_a_full_disk_can_be_continued_but_bad_data_leaves_nothing(many, tmp_path):
    interrupted(many, tmp_path / "out", error=OSError)
    assert (tmp_path / ".out.partial" / "journal.json").is_file()
    interrupted(many, tmp_path / "out", error=DataError)
    assert [p.name for p in tmp_path.iterdir()] == ["lab"]


def test_an_interruption_before_the_first_shard_leaves_nothing(many, tmp_path):
    interrupted(many, tmp_path / "out", at=0)
    assert [p.name for p in tmp_path.iterdir()] == ["lab"]


def test_a_folder_that_is_being_written_is_left_to_its_writer(many, tmp_path):
    left = tmp_path / ".out.partial"
    left.mkdir()
    with (left / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(lambda: run(many, tmp_path / "out"), tmp_path / "out", "another process is writing it")
        assert left.is_dir()
    run(many, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lab", "out"]


@pytest.mark.slow
def test_a_killed_import_goes_on(tmp_path):
    """SIGKILL in the middle, with worker processes: the next run takes the shards over and the result is the same."""
    for number in range(400):
        write_mrc(tmp_path / "lab" / "ab"[number % 2] / f"p{number:03d}.mrc", volume(number, (16, 16, 16)))
    words = [lab := tmp_path / "lab", "--out", "out", "--volumes-per-shard", 4, "--workers", 2, "--rescale", 5]
    line = [sys.executable, "-m", "studytool.cli", "data", "import", *map(str, words)]
    process = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.DEVNULL)
    journal = tmp_path / ".out.partial" / "journal.json"
    deadline = time.monotonic() + 60
    while process.poll() is None and not journal.is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    finished = len(json.loads(journal.read_text())["shards"])
    assert 0 < finished < 100
    before = (tmp_path / ".out.partial" / "part-00000.parquet").stat().st_ino
    subprocess.run(line, cwd=tmp_path, stdout=subprocess.DEVNULL, timeout=120, check=True)
    assert (tmp_path / "out" / "part-00000.parquet").stat().st_ino == before
    settings = {"volumes_per_shard": 4, "rescale_to_angstrom": 5.0}
    assert run(lab, tmp_path / "again", **settings).fingerprint == verify_dataset(tmp_path / "out").fingerprint
