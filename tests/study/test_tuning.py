"""Whole studies through real Ray Tune, real training and a real MLflow store, on a network small enough for a test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from studytool.results import Outcome, TrialRecord
from studytool.study.ledger import read_records

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(600)]
TESTS = Path(__file__).parents[1]
STUDY = """
name: tiny
data:
  path: data
  simulate: {classes: 3, volumes_per_class: 20, side: 16, voxel_size_angstrom: 18.0, snr: 2.0}
arms:
  backbone: ["tiny_backbone:tiny"]
  freeze: [none, backbone]
search:
  learning_rate: {log_uniform: [1e-3, 1e-1]}
  trials_per_arm: 4
  scheduler: {asha: {grace_epochs: 1, reduction_factor: 2}}
confirm: {seeds: 2}
train: {max_epochs: 4, batch_size: 8}
metric: {target: 0.5}
"""


_STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def _nothing_left_running():
    """A test that fails half-way must not leave its study running."""
    yield
    for process in _STARTED:
        if process.poll() is None:
            process.kill()
            process.wait()
    _STARTED.clear()


class Study:
    def __init__(self, folder: Path, text: str = STUDY) -> None:
        self.folder = folder
        (folder / "a.yaml").write_text(text)
        self.environment = {**os.environ, "PYTHONPATH": str(TESTS)}

    def start(self, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "studytool.cli", "run", "a.yaml", "--verbose", *words]
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        _STARTED.append(process)
        return process

    def run(self, *words: str) -> str:
        process = self.start(*words)
        out, err = process.communicate(timeout=400)
        assert process.returncode == 0, err
        return out

    @property
    def records(self) -> dict[str, TrialRecord]:
        return {r.trial_id: r for r in read_records(self.folder / "studies" / "tiny")}

    def what_was_found(self) -> dict[str, tuple[object, ...]]:
        """All that must not depend on failures: outcomes, configurations, curves."""
        return {
            r.trial_id: (r.outcome, r.parameters, [(e.val, e.train_loss) for e in r.epochs], r.test)
            for r in self.records.values()
        }

    def mlflow_runs(self) -> list[dict[str, str]]:
        import mlflow

        client = mlflow.MlflowClient(f"sqlite:///{self.folder / 'mlflow.db'}")
        (experiment,) = [e for e in client.search_experiments() if e.name == "tiny"]
        runs = client.search_runs([experiment.experiment_id], max_results=1000)
        return [{**run.data.tags, "status": run.info.status} for run in runs]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Study, str]:
    study = Study(tmp_path_factory.mktemp("finished"))
    return study, study.run("--set", "resources.trials_at_once=1")


def test_a_study_ends_with_a_table_and_says_where_to_look_next(finished):
    study, out = finished
    for words in ("none", "backbone", "mlflow ui --backend-store-uri 'sqlite:////", "best.safetensors"):
        assert words in out
    checkpoint = next(line.split()[-1] for line in out.splitlines() if line.startswith("best checkpoint"))
    assert (study.folder / checkpoint).exists()
    assert "about" in out
    assert "left" in out


def test_every_trial_has_its_true_outcome_in_the_ledger_and_in_mlflow(finished):
    study, _ = finished
    records = study.records
    assert sum(r.phase == "search" for r in records.values()) == 8
    assert sum(r.phase == "confirm" for r in records.values()) == 4
    status = {Outcome.COMPLETE: "FINISHED", Outcome.PRUNED: "KILLED", Outcome.FAILED: "FAILED"}
    trials = {run["studytool.trial_id"]: run for run in study.mlflow_runs() if run["studytool.kind"] == "trial"}
    assert trials.keys() == records.keys()
    for trial_id, record in records.items():
        assert trials[trial_id]["studytool.outcome"] == record.outcome
        assert trials[trial_id]["status"] == status[record.outcome]


def test_arms_are_children_of_the_study_and_trials_of_their_arm(finished):
    study, _ = finished
    runs = study.mlflow_runs()
    kinds = [run["studytool.kind"] for run in runs]
    assert (kinds.count("study"), kinds.count("arm"), kinds.count("trial")) == (1, 2, 12)
    assert all("mlflow.parentRunId" in run for run in runs if run["studytool.kind"] != "study")


def test_the_test_split_is_read_in_the_confirm_phase_only(finished):
    study, _ = finished
    assert all((r.test is not None) == (r.phase == "confirm") for r in study.records.values())


def test_given_again_nothing_runs_again(finished):
    study, first = finished
    before = study.what_was_found()
    again = study.run("--set", "resources.trials_at_once=1")
    assert study.what_was_found() == before
    assert "COMPLETE " not in again
    assert len(study.mlflow_runs()) == 15
    assert first.splitlines()[-3:] == again.splitlines()[-3:]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_study_goes_on_and_ends_as_if_it_had_not_been_stopped(tmp_path, finished, number):
    study = Study(tmp_path)
    process = study.start("--set", "resources.trials_at_once=1")
    for line in process.stdout:
        if "search-001: epoch 1" in line:
            break
    # Only the driver is hit; what it started has to go by itself.
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGKILL: -9}[number], err
    assert sum(r.outcome is not None for r in study.records.values()) < 12
    _wait_until_gone(tmp_path)
    study.run("--set", "resources.trials_at_once=1")
    assert study.what_was_found() == finished[0].what_was_found()
    runs = study.mlflow_runs()
    assert len(runs) == 15
    assert not [run for run in runs if run["status"] == "RUNNING"]


def test_a_worker_that_dies_costs_at_most_its_epoch(tmp_path, finished):
    study = Study(tmp_path)
    process = study.start("--set", "resources.trials_at_once=1")
    for line in process.stdout:
        if "search-001: epoch 1" in line:
            break
    # The worker that takes the next step kills itself (see tiny_backbone), whichever trial it is at by then.
    (tmp_path / "die").touch()
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert not (tmp_path / "die").exists()
    assert study.what_was_found() == finished[0].what_was_found()
    assert sorted(r.attempts for r in study.records.values())[-2:] == [1, 2]
    assert len(study.mlflow_runs()) == 15


def _wait_until_gone(folder: Path) -> None:
    """Until no process works in the folder any more (Ray takes a while to notice that its driver is gone)."""
    import psutil

    for _ in range(150):
        there = [p for p in psutil.process_iter(["cwd"]) if p.info["cwd"] == str(folder)]
        if not there:
            return
        time.sleep(1)
    raise AssertionError(f"still running: {there}")
