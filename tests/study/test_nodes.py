from __future__ import annotations

import socket
import subprocess
import sys
import time

import pytest

from studytool.errors import StudytoolError
from studytool.study.nodes import ask_every_node, refuse_silence


def test_an_address_where_nothing_listens_is_one_line():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(StudytoolError, match=r"no Ray cluster answers there .*auth_token") as caught:
            ask_every_node(address, time.time)
    assert "\n" not in str(caught.value)


def test_other_forms_of_an_address_are_left_to_ray():
    refuse_silence("auto")
    refuse_silence("ray://127.0.0.1:1")


GARBAGE_WHILE_RAY_ENDS = """
import gc
import threading
import time

import ray

from studytool.study.nodes import ray_session

gc.set_threshold(5)


class Ring:
    def __init__(self, reference):
        self.itself, self.reference = self, reference


def drop():
    while references:
        Ring(references.pop())  # garbage that only the collector finds, in whatever thread it runs
        time.sleep(0.0005)


with ray_session():
    references = [ray.put(None) for _ in range(8_000)]
    dropping = threading.Thread(target=drop)
    dropping.start()
references.clear()
dropping.join()
print("left")
"""


@pytest.mark.end_to_end
def test_ray_is_left_whatever_another_thread_lets_go_of_meanwhile():
    """Ray ends the whole process, with exit code 1, where one of its objects is collected while it shuts down."""
    left = subprocess.run([sys.executable, "-c", GARBAGE_WHILE_RAY_ENDS], capture_output=True, text=True, timeout=120)
    assert (left.returncode, left.stdout) == (0, "left\n"), left.stderr
