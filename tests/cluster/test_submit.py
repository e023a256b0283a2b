"""A study sent to a cluster as a job: it goes on without the terminal, and its words can be read."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from ray_nodes import ray_nodes
from whole_study import TINY, TRIALS, Study

pytestmark = [pytest.mark.slow, pytest.mark.end_to_end, pytest.mark.timeout(600)]


def studytool(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "studytool.cli", *words]
    try:
        return subprocess.run(command, cwd=folder, text=True, capture_output=True, timeout=400)
    except subprocess.TimeoutExpired as late:
        raise AssertionError(f"{words}: nothing more after\n{late.stdout!r}\n{late.stderr!r}") from None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_submitted_study_runs_on_the_cluster_and_its_log_can_be_read(tmp_path, monkeypatch):
    there = tmp_path / "there"  # where the study's results go, and where its job does not work
    study = Study(there, TINY)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a.yaml").write_text(TINY)
    # The cluster's nodes have the program and the user's own network.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    full = [f"--set=output={there}/studies", f"--set=data.path={there}/data"]
    full.append(f"--set=tracking.uri=sqlite:///{there}/mlflow.db")
    port = free_port()
    address = ["--address", f"http://127.0.0.1:{port}"]

    refused = studytool("submit", "a.yaml", *address, folder=tmp_path / "here")
    assert refused.returncode == 1
    assert "data.path: 'data' is a relative path" in refused.stderr
    nobody = studytool("submit", "a.yaml", *full, *address, folder=tmp_path / "here")
    assert nobody.returncode == 1
    assert nobody.stderr.count("\n") == 1, nobody.stderr

    with ray_nodes(3, dashboard_port=port):
        sent = studytool("submit", "a.yaml", *full, *address, folder=tmp_path / "here")
        assert sent.returncode == 0, sent.stderr
        job = sent.stdout.split()[1].rstrip(";")
        followed = studytool("logs", job, "--follow", *address, folder=tmp_path)
        assert followed.returncode == 0, followed.stdout + followed.stderr
        assert "table and figures" in followed.stdout
        assert studytool("logs", "tiny", *address, folder=tmp_path).stdout == followed.stdout
        assert "no job of that id" in studytool("logs", "other", *address, folder=tmp_path).stderr

    assert len(study.records) == TRIALS
    assert all(record.outcome for record in study.records.values())
    status = studytool("status", str(there / "studies/tiny"), folder=tmp_path)
    assert "finished, 0 trials left" in status.stdout
    last = studytool("logs", str(there / "studies/tiny"), folder=tmp_path)
    assert "COMPLETE" in last.stdout
