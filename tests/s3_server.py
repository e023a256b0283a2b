"""A real S3 server on loopback, for tests and benchmarks: moto's, in a process of its own, empty at first."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
_SERVE = "import sys; from moto.server import main; main(['-H', '127.0.0.1', '-p', sys.argv[1]])"


def s3_client(port: int) -> Any:
    """pyarrow's file system of the server, which may make buckets."""
    from pyarrow import fs

    return fs.S3FileSystem(
        endpoint_override=f"127.0.0.1:{port}",
        scheme="http",
        allow_bucket_creation=True,
        access_key=KEYS["AWS_ACCESS_KEY_ID"],
        secret_key=KEYS["AWS_SECRET_ACCESS_KEY"],
    )


@contextmanager
def s3_server(port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run the server on `port`; clients find it by AWS_ENDPOINT_URL=http://127.0.0.1:PORT and `KEYS`."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, str(port)],
            env={**os.environ, **KEYS},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
