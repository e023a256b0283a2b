from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys

import pytest

from studytool.study.signals import SIGNAL_EXIT_CODES, sheltered

WORK = """
import sys, time
from studytool.study.signals import EndedBySignal, Signals
try:
    with Signals(last_seconds=float(sys.argv[2])):
        try:
            print("ready", flush=True)
            time.sleep(60)
        finally:
            print("saving", flush=True)
            time.sleep(float(sys.argv[1]))
            print("saved", flush=True)
except EndedBySignal as end:
    sys.exit(end.exit_code)
"""


@pytest.fixture(autouse=True)
def not_under_nohup():
    """Where the tests themselves run under `nohup`, what they start must not inherit it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def _start(seconds_to_save: float, last_seconds: float = 14) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", WORK, str(seconds_to_save), str(last_seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("name", sorted(SIGNAL_EXIT_CODES))
def test_the_first_signal_lets_the_program_save(name):
    process = _start(0)
    process.send_signal(signal.Signals[name])
    assert process.communicate(timeout=30)[0] == "saving\nsaved\n"
    assert process.returncode == {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 75, "SIGHUP": 129}[name]


def test_a_closed_terminal_lets_the_program_save_though_nobody_reads_what_it_writes(tmp_path):
    ours, theirs = pty.openpty()
    work = WORK.replace('"saved", flush=True)', '"saved", flush=True); open(sys.argv[3], "w").close()')
    work = f"import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0){work}"
    process = subprocess.Popen(
        [sys.executable, "-c", work, "0", "14", str(tmp_path / "saved")],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    said = b""
    while not said.endswith(b"\n"):
        said += os.read(ours, 100)
    os.close(ours)
    assert said == b"ready\r\n"
    assert process.wait(timeout=30) == 129
    assert (tmp_path / "saved").exists()


def test_under_nohup_the_program_goes_on_without_its_terminal():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = _start(0)
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == "saving\nsaved\n"
    assert process.returncode == 143


def test_the_second_one_ends_it_at_once():
    process = _start(60)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "studytool: stopped at once by a second signal, SIGINT\n")
    assert process.returncode == 130


def test_the_same_one_twice_in_a_moment_is_one():
    """`timeout` signals its child, and then the whole group, the child too."""
    process = _start(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30) == ("saved\n", "")
    assert process.returncode == 143


def test_a_program_that_hangs_while_it_saves_is_gone_all_the_same():
    process = _start(600, last_seconds=0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert out == "saving\n"
    assert err == "studytool: ended by SIGINT; what it waited for did not answer within 0.2 s\n"
    assert process.returncode == 130


def test_a_process_started_in_shelter_does_not_hear_what_ends_the_run():
    with sheltered():
        child = subprocess.Popen(
            [sys.executable, "-c", "import sys; print('up', flush=True); sys.stdin.read()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    assert child.stdout.readline() == "up\n"
    for name in SIGNAL_EXIT_CODES:
        child.send_signal(signal.Signals[name])
    assert child.communicate("")[0] == ""
    assert child.returncode == 0
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.Signals[name] for name in SIGNAL_EXIT_CODES}
