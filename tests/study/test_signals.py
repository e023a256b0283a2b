from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from studytool.study.signals import SIGNAL_EXIT_CODES

WORK = """
import sys, time
from studytool.study.signals import EndedBySignal, Signals
try:
    with Signals():
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


def _start(seconds_to_save: float) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", WORK, str(seconds_to_save)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("name", sorted(SIGNAL_EXIT_CODES))
def test_the_first_signal_lets_the_program_save(name):
    process = _start(0)
    process.send_signal(signal.Signals[name])
    assert process.communicate(timeout=30)[0] == "saving\nsaved\n"
    assert process.returncode == {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 75}[name]


def test_the_second_one_ends_it_at_once():
    process = _start(60)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[0] == ""
    assert process.returncode == 130


def test_a_program_that_hangs_while_it_saves_is_gone_all_the_same():
    process = _start(600)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0] == "saving\n"
    assert process.returncode == 130
