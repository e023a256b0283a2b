"""A whole study in a folder of its own, run from the command line: real Ray, real training, a real MLflow store."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from studytool.results import Outcome, TrialRecord
from studytool.study.records import read_records

TINY = """
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
train: {max_epochs: 4, batch_size: 8, checkpoints: each_epoch}
metric: {target: 0.5}
resources: {trials_at_once: 1}
"""
TRIALS = 12
"""Of the tiny study: two arms with four search and two confirm trials each."""
STEPS_PER_EPOCH = 5
"""36 training volumes in batches of 8."""
_STATUS = {Outcome.COMPLETE: "FINISHED", Outcome.PRUNED: "KILLED", Outcome.FAILED: "FAILED"}


class Study:
    """A study file in `folder`; everything that running it makes lies there too."""

    def __init__(self, folder: Path, text: str = TINY) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.text = text
        (folder / "a.yaml").write_text(text)
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Begin `studytool run`."""
        process = subprocess.Popen(
            [sys.executable, "-m", "studytool.cli", "run", "a.yaml", "--verbose", "--no-plan", *words],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def run(self, *words: str) -> str:
        """Run the study to its end; what it printed."""
        process = self.start(*words)
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        return out

    def kill_what_runs(self) -> None:
        """A test that fails half-way must not leave its study running."""
        for process in self.started:
            if process.poll() is None:
                process.kill()
                process.communicate()

    @property
    def records(self) -> dict[str, TrialRecord]:
        """The ledger, by trial id."""
        return {r.trial_id: r for r in read_records(self.folder / "studies" / "tiny")}

    def what_was_found(self) -> dict[str, tuple[object, ...]]:
        """All that must not depend on failures: outcomes, configurations, curves."""
        return {
            r.trial_id: (r.outcome, r.parameters, [(e.val, e.train_loss) for e in r.epochs], r.test)
            for r in self.records.values()
        }

    def steps(self) -> int:
        """How many training steps were computed, if there was a file `count-steps` from the start."""
        return (self.folder / "count-steps").stat().st_size

    def runs_in_mlflow(self) -> list[Any]:
        """The study's runs, as MLflow gives them."""
        return list(self._client().search_runs([self._experiment()], max_results=1000))

    def mlflow_runs(self) -> list[dict[str, str]]:
        """The tags of the study's runs, with their status and id."""
        return [{**run.data.tags, "status": run.info.status, "id": run.info.run_id} for run in self.runs_in_mlflow()]

    def problems_in_mlflow(self) -> list[str]:
        """What is wrong after the study has finished: each trial has one run, each epoch one point, the states fit."""
        runs = [run for run in self.mlflow_runs() if run["studytool.kind"] == "trial"]
        counts = Counter(run["studytool.trial_id"] for run in runs)
        records = self.records
        problems = [f"{trial_id} has {count} runs" for trial_id, count in counts.items() if count != 1]
        problems += [f"{trial_id} has no run" for trial_id in records if trial_id not in counts]
        problems += [f"{run['id']} is RUNNING" for run in self.mlflow_runs() if run["status"] == "RUNNING"]
        for run in runs:
            record = records[run["studytool.trial_id"]]
            if record.outcome is None or run["status"] != _STATUS[record.outcome]:
                problems.append(f"{record.trial_id} is {run['status']}, the ledger says {record.outcome}")
            if record.mlflow_run != run["id"]:
                problems.append(f"{record.trial_id}: the ledger names another run")
            for metric in ("val/loss", "train/loss", "cost/device_seconds"):
                steps = sorted(point.step for point in self._client().get_metric_history(run["id"], metric))
                if steps != list(range(1, len(record.epochs) + 1)):
                    problems.append(f"{record.trial_id}: {metric} has the steps {steps}")
        return problems

    def seconds_until_gone(self, most: float = 60) -> float:
        """Wait until no process works in the folder any more; AssertionError if there is one after `most` seconds."""
        begun = time.monotonic()
        while there := self.processes():
            assert time.monotonic() - begun < most, f"still running: {there}"
            time.sleep(0.2)
        return time.monotonic() - begun

    def processes(self) -> list[psutil.Process]:
        """Everything that works in the folder: the driver, Ray, the workers, the guardian."""
        return [
            process
            for process in psutil.process_iter(["cwd", "status"])
            # The driver is this process's child, and a zombie until its end is asked for.
            if process.info["cwd"] == str(self.folder) and process.info["status"] != psutil.STATUS_ZOMBIE
        ]

    def workers(self) -> list[psutil.Process]:
        """The processes that train, or are about to."""
        found = []
        for process in self.processes():
            try:
                title = (process.cmdline() or [""])[0]
                if title.startswith(("ray::Worker", "ray::ResourceTrainable")):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def _client(self) -> Any:
        import mlflow

        return mlflow.MlflowClient(f"sqlite:///{self.folder / 'mlflow.db'}")

    def _experiment(self) -> str:
        (found,) = [e for e in self._client().search_experiments() if e.name == "tiny"]
        return str(found.experiment_id)
