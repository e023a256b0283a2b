"""Processes of a running study killed at random moments, and what is left of the study after that."""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

from whole_study import STEPS_PER_EPOCH, TINY, Study

from studytool.results import TrialRecord

# In both arms every layer is trained: the backbone counts its steps, and is slow, in training only.
_TRAINED = TINY.replace("[none, backbone]", "[none, layer_decay]")
SCHEDULERS = {"asha": _TRAINED, "fifo": _TRAINED.replace("{asha: {grace_epochs: 1, reduction_factor: 2}}", "none")}
SECONDS_PER_STEP = "0.05"
"""Slow enough that most moments of a study fall into its training."""
SECONDS_OF_TRAINING = 8.0
"""A driver is killed so long after its first step at most, however long its start takes on this machine."""
SHARE_IN_THE_START = 0.3
"""Of the kills of drivers, at moments before the first step."""
MOST_DEATHS = 2
"""A trial whose workers die more often than that is given up, as it should be."""


class BrokenPromiseError(AssertionError):
    """A promise that was not kept; it says what was found."""


def reference(folder: Path, scheduler: str) -> Study:
    """The study without any failure, made once."""
    study = Study(folder, SCHEDULERS[scheduler])
    if not (folder / "finished").exists():
        if (folder / "studies").exists():
            shutil.rmtree(folder / "studies")
            (folder / "mlflow.db").unlink(missing_ok=True)
        (folder / "count-steps").write_bytes(b"")
        (folder / "slow").write_text(SECONDS_PER_STEP)
        begun, first_step = time.monotonic(), 0.0
        process = study.start()
        try:
            while process.poll() is None and not first_step:
                time.sleep(0.1)
                first_step = time.monotonic() - begun if study.steps() else 0.0
            _, err = process.communicate()
        finally:
            study.kill_what_runs()
        if process.returncode:
            raise BrokenPromiseError(f"exit code {process.returncode}: {err}")
        (folder / "finished").write_text(str(first_step))
    return study


def worker_kills(folder: Path, count: int, seed: int, scheduler: str = "asha") -> dict[str, float]:
    """SIGKILL of workers at `count` random moments, in as many studies as it takes.

    Raises:
        BrokenPromiseError: a study did not end as the one without kills.
    """
    expected, rng = reference(folder / f"reference-{scheduler}", scheduler), random.Random(seed)
    kills, studies, lost_steps, gone = 0, 0, 0, 0.0
    while kills < count:
        study = _fresh(folder / f"workers-{studies}", expected)
        killed = 0
        process = study.start()
        try:
            while kills < count and _wait_for_steps(study, process):
                time.sleep(rng.uniform(0, 2 * float(SECONDS_PER_STEP) * STEPS_PER_EPOCH))
                workers = study.workers()
                running = [r for r in study.records.values() if r.outcome is None] if workers else []
                if running and all(r.attempts <= MOST_DEATHS for r in running):
                    rng.choice(workers).kill()
                    kills, killed = kills + 1, killed + 1
                    time.sleep(0.1)  # the last step of the killed worker is not the first one of the next
            _, err = process.communicate()
            if process.returncode:
                raise BrokenPromiseError(f"exit code {process.returncode}: {err}")
        finally:
            study.kill_what_runs()
        gone = max(gone, study.seconds_until_gone())
        lost_steps += compare(study, expected, kills=killed)
        studies += 1
        shutil.rmtree(study.folder)
    return _figures(kills, studies, lost_steps, gone)


def driver_kills(folder: Path, count: int, seed: int, scheduler: str = "asha") -> dict[str, float]:
    """SIGKILL of the driver at `count` random moments, the same command given again each time.

    Raises:
        BrokenPromiseError: a finished trial ran again or was lost, a process stayed, or the study ended in another way.
    """
    expected, rng = reference(folder / f"reference-{scheduler}", scheduler), random.Random(seed)
    longest_start = float((expected.folder / "finished").read_text())
    kills, studies, lost_steps, gone = 0, 0, 0, 0.0
    while kills < count:
        study = _fresh(folder / f"drivers-{scheduler}-{studies}", expected)
        killed, finished = 0, False
        while not finished:
            steps, epochs = study.steps(), _epochs(study)
            process = study.start()
            try:
                # The last study is let through when there have been kills enough.
                if kills < count:
                    if rng.random() < SHARE_IN_THE_START:
                        time.sleep(rng.uniform(0.5, longest_start))
                    elif _wait_for_steps(study, process):
                        time.sleep(rng.uniform(0, SECONDS_OF_TRAINING))
                    finished = process.poll() is not None
                    process.kill()
                    _, err = process.communicate()
                    if finished and process.returncode:
                        raise BrokenPromiseError(f"exit code {process.returncode}: {err}")
                    kills, killed = kills + (not finished), killed + (not finished)
                else:
                    _, err = process.communicate()
                    if process.returncode:
                        raise BrokenPromiseError(f"exit code {process.returncode}: {err}")
                    finished = True
            finally:
                study.kill_what_runs()
            gone = max(gone, study.seconds_until_gone())
            _check_kept(study)
            # One trial at a time: of an epoch that was begun, and is not in the ledger, there is at most one.
            unrecorded = study.steps() - steps - STEPS_PER_EPOCH * (_epochs(study) - epochs)
            if abs(unrecorded) > STEPS_PER_EPOCH:
                raise BrokenPromiseError(f"{study.folder}: {unrecorded} steps were computed that no record has")
        lost_steps += compare(study, expected, kills=killed)
        studies += 1
        shutil.rmtree(study.folder)
    return _figures(kills, studies, lost_steps, gone)


def compare(study: Study, expected: Study, *, kills: int) -> int:
    """Check that a study ended as the other one did, to the last bit, here and in MLflow; the steps it did twice."""
    found, wanted = study.what_was_found(), expected.what_was_found()
    for trial_id in sorted({*found, *wanted}):
        if found.get(trial_id) != wanted.get(trial_id):
            raise BrokenPromiseError(
                f"{study.folder} ended otherwise than {expected.folder}: {trial_id} is\n"
                f"{found.get(trial_id)}\nwhere it was\n{wanted.get(trial_id)}"
            )
    problems = study.problems_in_mlflow()
    if problems:
        raise BrokenPromiseError(f"{study.folder}: {problems[0]} ({len(problems)} problems in MLflow)")
    repeated = study.steps() - expected.steps()
    if not 0 <= repeated <= kills * STEPS_PER_EPOCH:
        raise BrokenPromiseError(f"{study.folder}: {repeated} steps were repeated for {kills} kills")
    return repeated


def _figures(kills: int, studies: int, lost_steps: int, gone: float) -> dict[str, float]:
    return {
        "kills": kills,
        "studies": studies,
        "steps repeated per kill": round(lost_steps / kills, 2),
        "seconds until all processes were gone": round(gone, 1),
    }


def _fresh(folder: Path, expected: Study) -> Study:
    shutil.rmtree(folder, ignore_errors=True)
    study = Study(folder, expected.text)
    shutil.copytree(expected.folder / "data", folder / "data")
    (folder / "count-steps").touch()
    (folder / "slow").write_text(SECONDS_PER_STEP)
    return study


_ENDED: dict[Path, dict[str, TrialRecord]] = {}


def _check_kept(study: Study) -> None:
    """A trial that has ended stays as it is."""
    if not (study.folder / "studies").exists():
        return
    now = {t: r for t, r in study.records.items() if r.outcome is not None}
    for trial_id, record in _ENDED.get(study.folder, {}).items():
        # Only MLflow's name for its run may come later.
        if trial_id not in now or record not in (now[trial_id], replace(now[trial_id], mlflow_run="")):
            raise BrokenPromiseError(f"{study.folder}: {trial_id} had ended, and did so again or was dropped")
    _ENDED[study.folder] = now


def _epochs(study: Study) -> int:
    """How many epochs the ledger has of all trials."""
    return sum(len(r.epochs) for r in study.records.values()) if (study.folder / "studies").exists() else 0


def _wait_for_steps(study: Study, process: subprocess.Popen[str]) -> bool:
    """Until a training step more is computed; False if the study has ended before."""
    steps = study.steps()
    while process.poll() is None:
        if study.steps() != steps:
            return True
        time.sleep(0.02)
    return False
