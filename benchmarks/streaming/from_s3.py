"""A dataset from an S3 server on this machine: how fast it is copied, and read afterwards."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from candidates import studytool_stream
from common import STEP, Data

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))  # for the server that the tests use, too


def from_s3(data: Data, folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds to copy the dataset `folder` by studytool and by pyarrow, then of epochs from the copy and the original.

    Both copy the same files from the same server; studytool checks them against their checksums on the way.
    """
    from mlflow_server import free_port
    from pyarrow import fs
    from s3_server import KEYS, s3_server

    from studytool.data.remote_copy import local_copy

    port = free_port()
    address = f"http://127.0.0.1:{port}"
    os.environ.update(KEYS, AWS_ENDPOINT_URL=address, STUDYTOOL_CACHE=str(data.root / "cache"))
    by_studytool, by_pyarrow = [], []
    with s3_server(port, data.root / "s3.log"):
        s3 = fs.S3FileSystem(allow_bucket_creation=True, endpoint_override=address)
        s3.create_dir("bucket")
        fs.copy_files(str(folder), "bucket/data", destination_filesystem=s3)
        cache, target = data.root / "cache", data.root / "copied"
        for _ in range(rounds):
            for made_before in (cache, target):
                shutil.rmtree(made_before, ignore_errors=True)
            started = time.perf_counter()
            copy = local_copy("s3://bucket/data")
            by_studytool.append(time.perf_counter() - started)
            target.mkdir()
            started = time.perf_counter()
            fs.copy_files("bucket/data", str(target), source_filesystem=s3)
            by_pyarrow.append(time.perf_counter() - started)
    sources = {"from_copy": str(copy.relative_to(data.root)), "from_original": folder.name}
    epochs = {name: studytool_stream(data, source) for name, source in sources.items()}
    seconds: dict[str, list[float]] = {name: [] for name in epochs}
    for turn in range(4 * rounds + 1):
        for name in sorted(epochs, reverse=turn % 2 == 1):
            started = time.perf_counter()
            for volumes, _numbers in epochs[name](turn):
                float(volumes.reshape(len(volumes), -1)[:, ::STEP].sum())
            seconds[name].append(time.perf_counter() - started)
    for made in (cache, target):
        shutil.rmtree(made)
    # the first epoch of each maps its pages
    return {"studytool": by_studytool, "pyarrow": by_pyarrow, **{name: found[1:] for name, found in seconds.items()}}
