from __future__ import annotations

import socket
from pathlib import Path

import pytest

from studytool.errors import StudytoolError
from studytool.study.tracking.ui import HOST, mlflow_pages


def test_a_port_that_is_taken_is_said_at_once(tmp_path: Path):
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        pages = mlflow_pages(f"sqlite:///{tmp_path / 'mlflow.db'}", port=port)
        with pytest.raises(StudytoolError, match=f"--port {port}: is taken"), pages:
            raise AssertionError("it was served")
