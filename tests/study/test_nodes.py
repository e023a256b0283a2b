from __future__ import annotations

import socket
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
