from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from studytool.study.guardian import MARK, clear_up, clear_up_after_the_dead

DRIVER = """
import os, subprocess, sys
from studytool.study.guardian import guarded_folder, mark
CHILD = "import os, signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
CHILD += "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']) if sys.argv[1:] else None; "
CHILD += "print(child.pid if child else 0, flush=True); time.sleep(600)"
with guarded_folder() as folder:
    with mark(folder):
        marked = subprocess.Popen([sys.executable, "-c", CHILD, "one"], stdout=subprocess.PIPE, start_new_session=True)
    grandchild = int(marked.stdout.readline())
    foreign = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, start_new_session=True)
    foreign.stdout.readline()
    print(folder, marked.pid, grandchild, foreign.pid, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def driver(tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    folder, *pids = process.stdout.readline().split()
    yield process, Path(folder), [int(pid) for pid in pids]
    process.kill()
    process.communicate()
    os.kill(int(pids[-1]), signal.SIGKILL)


def _wait_for(condition) -> None:
    for _ in range(300):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not come about in 30 s")


def _alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("end", ["whole", "killed"])
def test_the_sessions_processes_and_folder_are_gone_and_nobody_elses(driver, end):
    process, folder, (marked, grandchild, foreign) = driver
    assert folder.stat().st_mode & 0o077 == 0
    assert _alive(marked)
    assert _alive(grandchild)
    if end == "whole":
        process.communicate("")
    else:
        process.kill()
        process.wait()
    _wait_for(lambda: not folder.exists())
    assert not _alive(marked)
    assert not _alive(grandchild)
    assert _alive(foreign)


def test_what_a_driver_left_that_was_killed_with_its_guardian_is_cleared_up_by_the_next(driver, monkeypatch):
    process, folder, (marked, _, foreign) = driver
    (guardian,) = (p for p in psutil.Process(process.pid).children() if "guardian.py" in " ".join(p.cmdline()))
    monkeypatch.setattr("tempfile.tempdir", str(folder.parent))
    clear_up_after_the_dead()
    assert folder.exists()  # its driver is alive
    guardian.kill()
    process.kill()
    process.wait()
    assert _alive(marked)
    clear_up_after_the_dead()
    assert not folder.exists()
    _wait_for(lambda: not _alive(marked))
    assert _alive(foreign)


def test_the_mark_is_not_on_this_process():
    assert MARK not in os.environ


def test_a_process_of_rays_that_hides_its_mark_is_known_by_its_open_files(tmp_path):
    (tmp_path / "session").mkdir()
    (tmp_path / "other").mkdir()
    begin = "import sys, time; open('/proc/self/comm', 'w').write(sys.argv[1]); file = open(sys.argv[2], 'w'); "
    started = [
        subprocess.Popen(
            [sys.executable, "-c", begin + "print(flush=True); time.sleep(600)", name, tmp_path / where / "log"],
            stdout=subprocess.PIPE,
        )
        for name, where in [("ray::Agent", "session"), ("ray::Agent", "other"), ("tail", "session")]
    ]
    try:
        for process in started:
            assert process.stdout
            process.stdout.readline()
        clear_up(tmp_path / "session")
        _wait_for(lambda: started[0].poll() is not None)
        assert [process.poll() for process in started[1:]] == [None, None]
    finally:
        for process in started:
            process.kill()
            process.communicate()
