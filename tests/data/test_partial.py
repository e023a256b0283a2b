from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest

from studytool.data.partial import whole_folder
from studytool.errors import DataError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_nothing_stands_under_the_name_until_it_is_whole(tmp_path):
    with whole_folder(tmp_path / "a" / "out") as temporary:
        (temporary / "file").write_text("x")
        assert names(tmp_path / "a") == [".out.partial"]
    assert names(tmp_path / "a") == ["out"]
    assert names(tmp_path / "a" / "out") == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_an_error_leaves_nothing(tmp_path, error):
    with pytest.raises(error), whole_folder(tmp_path / "out"):
        raise error
    assert names(tmp_path) == []


@pytest.mark.parametrize(("error", "kept"), [(KeyboardInterrupt, True), (OSError, True), (DataError, False)])
def test_a_journal_makes_an_interruption_leave_the_folder(tmp_path, error, kept):
    def write_in_vain():
        with whole_folder(tmp_path / "out", journal="j") as temporary:
            (temporary / "j").write_text("1")
            raise error

    with pytest.raises(error):
        write_in_vain()
    assert names(tmp_path) == ([".out.partial"] if kept else [])
    with whole_folder(tmp_path / "out", journal="j") as temporary:
        assert (temporary / "j").is_file() == kept
    assert names(tmp_path) == ["out"]


def test_two_writers_do_not_meet(tmp_path):
    with whole_folder(tmp_path / "out") as temporary:
        (temporary / "mine").write_text("x")
        with pytest.raises(DataError, match="out: another process is writing it"), whole_folder(tmp_path / "out"):
            pass
        assert (temporary / "mine").is_file()
    with pytest.raises(DataError, match="exists already"), whole_folder(tmp_path / "out"):
        pass
    assert names(tmp_path / "out") == ["mine"]


def test_what_a_dead_writer_left_is_removed(tmp_path):
    left = tmp_path / ".out.partial"
    (left / "deep").mkdir(parents=True)
    (left / "deep" / "part").write_text("x")
    (left / ".lock").touch()
    with whole_folder(tmp_path / "out") as temporary:
        assert names(temporary) == [".lock"]
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == []


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(DataError, match="exists already"), whole_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["out"]


def test_the_lock_ends_with_the_process(tmp_path):
    code = (
        "import pathlib, sys, time\n"
        "from studytool.data.partial import whole_folder\n"
        "with whole_folder(pathlib.Path(sys.argv[1])) as temporary:\n"
        "    (temporary / 'part').write_text('x')\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")])
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / ".out.partial" / "part").is_file() and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(DataError, match="another process is writing it"), whole_folder(tmp_path / "out"):
            pass
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)
    finally:
        process.kill()
    assert names(tmp_path) == [".out.partial"]
    with whole_folder(tmp_path / "out") as temporary:
        assert names(temporary) == [".lock"]
    assert names(tmp_path) == ["out"]


def test_a_file_system_without_locks_keeps_nobody_off(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(95, os.strerror(95))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with whole_folder(tmp_path / "out") as temporary:
        (temporary / "file").touch()
    assert names(tmp_path / "out") == ["file"]
