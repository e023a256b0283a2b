"""MLflow's own pages on a study's store: for this machine only, and gone when they are no longer wanted."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from studytool.errors import StudytoolError
from studytool.study.tracking.store import absolute_uri, explained, open_client, sqlite_path

HOST = "127.0.0.1"
USUAL_PORT = 5000
_START_SECONDS = 180.0
_END_SECONDS = 15.0


@dataclass(frozen=True)
class Comparison:
    """A study's runs and the comparison of its arms, as the part of an address after the server's; "" without arms."""

    study: str
    runs: str
    arms: str


def find_comparisons(uri: str, study: str | None = None) -> list[Comparison]:
    """The studies in a store, or the one of that name.

    Raises:
        StudytoolError: the address is none, there is no store, or no such study in it.
    """
    address = absolute_uri(uri)
    path = sqlite_path(address)
    if path is not None and not path.is_file():
        raise StudytoolError(f"tracking.uri: {path} is not there; go to the folder that the study was run in")
    client = open_client(address)
    with explained(address):
        experiments = [e for e in client.search_experiments() if study is None or e.name == study]
        found = []
        for experiment in experiments:
            runs = client.search_runs(
                [experiment.experiment_id], filter_string="tags.`studytool.kind` = 'arm'", max_results=200
            )
            if not runs and study is None:
                continue  # not of studytool
            chosen = quote(json.dumps([run.info.run_id for run in runs]))
            number = experiment.experiment_id
            arms = f"/#/compare-runs?runs={chosen}&experiments={quote(json.dumps([number]))}" if runs else ""
            found.append(Comparison(experiment.name, f"/#/experiments/{number}/runs", arms))
    if study is not None and not found:
        raise StudytoolError(f"tracking.uri: {address} holds no study called {study}")
    return found


@contextmanager
def mlflow_pages(uri: str, *, port: int | None = None) -> Iterator[tuple[str, subprocess.Popen[bytes] | None]]:
    """Serve a store's pages on loopback within the block; yields their address and the server's process.

    A store that is a server has pages of its own: its address, and no process. `port` None is 5000, or a free one where
    that is taken.

    Raises:
        StudytoolError: the server does not start; says why.
    """
    address = absolute_uri(uri)
    path = sqlite_path(address)
    if address.startswith(("http:", "https:")):
        yield address.rstrip("/"), None
        return
    chosen = _free((USUAL_PORT, 0) if port is None else (port,))
    with tempfile.TemporaryDirectory(prefix="studytool-ui-") as scratch:
        log = Path(scratch) / "server.log"
        process = _start(address, chosen, path.parent if path else Path(scratch), log)
        try:
            _wait_until_it_answers(process, chosen, log)
            yield f"http://{HOST}:{chosen}", process
        finally:
            _end(process)


def _start(uri: str, port: int, folder: Path, log: Path) -> subprocess.Popen[bytes]:
    hosts = ",".join(f"{name}:{port}" for name in (HOST, "localhost"))
    origins = ",".join(f"http://{name}:{port}" for name in (HOST, "localhost"))
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1",
        "--backend-store-uri", uri, "--artifacts-destination", str(folder / "mlartifacts"),
        "--allowed-hosts", hosts, "--cors-allowed-origins", origins,
    ]  # fmt: skip
    environment = {
        **os.environ,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
    }
    with log.open("wb") as file:
        # A group of its own, so that Ctrl-C comes to this process alone, which then ends all of the server's.
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file, cwd=folder, start_new_session=True)


def _wait_until_it_answers(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), opener.open(f"http://{HOST}:{port}/health", timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.2)
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    raise StudytoolError(f"MLflow's server does not start: {lines[-1].strip() if lines else 'it says nothing'}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the server and every process of its group."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_SECONDS)
            if not _group_lives(process.pid):
                return


def _group_lives(group: int) -> bool:
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.05)
    return True


def _free(ports: tuple[int, ...]) -> int:
    for port in ports:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
            return int(probe.getsockname()[1])
    if 0 in ports:
        raise StudytoolError("no port is free for MLflow's pages; name one with --port")
    raise StudytoolError(f"--port {ports[0]}: is taken, or may not be used; name another one, or leave it away")
