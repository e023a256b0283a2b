"""Whole studies through real Ray Tune, real training and a real MLflow store, on a network small enough for a test."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator

import pytest
from whole_study import STEPS_PER_EPOCH, TRIALS, Study

from studytool.results import Outcome

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Study, str]:
    study = Study(tmp_path_factory.mktemp("finished"))
    (study.folder / "count-steps").touch()
    return study, study.run()


@pytest.fixture
def study(tmp_path, finished) -> Iterator[Study]:
    """A study not begun yet, on the same data."""
    study = Study(tmp_path)
    (tmp_path / "count-steps").touch()
    shutil.copytree(finished[0].folder / "data", tmp_path / "data")
    yield study
    study.kill_what_runs()


def test_a_study_ends_with_a_table_and_says_where_to_look_next(finished):
    study, out = finished
    for words in ("none", "backbone", "studytool ui ", "best.safetensors"):
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
    again = study.run()
    assert study.what_was_found() == before
    assert "COMPLETE " not in again
    assert len(study.mlflow_runs()) == 15
    assert first.splitlines()[-3:] == again.splitlines()[-3:]


def _read_until(process, words: str) -> str:
    for line in process.stdout:
        if words in line:
            return line
    raise AssertionError(process.communicate()[1])


def test_a_study_ended_in_every_way_and_given_again_each_time_ends_as_if_nothing_had_been(study, finished):
    """Signals to the whole group, as a terminal and `timeout` send them; a driver that is killed; a worker that is."""
    ways = [
        (lambda pid: (os.kill(pid, signal.SIGTERM), os.killpg(pid, signal.SIGTERM)), "SIGTERM", 143),
        (lambda pid: os.killpg(pid, signal.SIGINT), "SIGINT", 130),
        (lambda pid: os.kill(pid, signal.SIGUSR1), "SIGUSR1", 75),
        (lambda pid: os.kill(pid, signal.SIGKILL), "", -9),  # what the driver started has to go by itself
    ]
    for end, name, code in ways:
        process = study.start()
        _read_until(process, ": epoch ")
        (study.folder / "slow").write_text("60")  # the next step will not be over before the study is
        end(process.pid)
        out, err = process.communicate(timeout=30)
        assert process.returncode == code, err
        assert study.seconds_until_gone() < 60
        before = study.records
        if name:
            assert f"ended by {name}; the same command goes on where the study stopped" in out
            assert "trials: " in out
            assert err == ""
            assert {run["status"] for run in study.mlflow_runs()} <= {"FINISHED", "KILLED"}
        assert sum(r.outcome is not None for r in before.values()) < TRIALS
        (study.folder / "slow").unlink()
    process = study.start()
    _read_until(process, ": epoch ")
    # The worker that takes the next step kills itself (see tiny_backbone), whichever trial it is at by then.
    (study.folder / "die").touch()
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert "its process died; trying again, see studies/tiny/trials/" in out
    assert "raylet" not in out + err
    assert not (study.folder / "die").exists()
    _check_ended_as_if_nothing_had_been(study, finished[0], kills=len(ways) + 1)
    assert sum(r.lost_device_seconds > 0 for r in study.records.values()) == 1  # the trial whose worker died
    after = study.records
    assert all(after[t].epochs[: len(r.epochs)] == r.epochs for t, r in before.items())


def test_a_second_signal_stops_at_once_with_a_line(study):
    process = study.start()
    _read_until(process, "search and ")
    os.killpg(process.pid, signal.SIGINT)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143
    assert err == "studytool: stopped at once by a second signal, SIGTERM\n"
    assert study.seconds_until_gone() < 60


def test_a_trial_out_of_memory_is_tried_again_in_smaller_parts_and_the_study_goes_on(study):
    (study.folder / "too-large").write_text("4")
    out = study.run("--set", "train.batch_size=8", "--set", "confirm.seeds=1", "--set", "search.trials_per_arm=1")
    assert "out of memory: " in out
    assert {(r.outcome, r.parts, r.attempts) for r in study.records.values()} == {(Outcome.COMPLETE, 4, 2)}
    assert all(r.lost_device_seconds > 0 for r in study.records.values())
    (log,) = (study.folder / "studies/tiny/trials").glob("*none.search-000/trial.log")
    assert "Traceback" in log.read_text()
    assert "epoch 4 " in log.read_text()


def test_without_a_retry_it_fails_with_advice_one_line_and_its_traceback_in_mlflow(study):
    (study.folder / "too-large").write_text("4")
    process = study.start("--set", "train.retry_out_of_memory=false", "--set", "search.trials_per_arm=1")
    out, err = process.communicate(timeout=400)
    assert process.returncode == 1
    assert "no trial of the study finished" in err
    assert "Traceback" not in out + err
    assert "lower batch_size" in out
    runs = [run for run in study.mlflow_runs() if run["studytool.kind"] == "trial"]
    assert {run["status"] for run in runs} == {"FAILED"}
    assert all("out of memory" in run["studytool.message"] for run in runs)
    (artifact,) = (study.folder / "studies/tiny/mlflow").glob(f"**/{runs[0]['id']}/artifacts/trial.log")
    assert "Traceback" in artifact.read_text()


def _check_ended_as_if_nothing_had_been(study: Study, reference: Study, *, kills: int) -> None:
    assert study.what_was_found() == reference.what_was_found()
    assert study.problems_in_mlflow() == []
    assert len(study.mlflow_runs()) == 15
    assert reference.steps() <= study.steps() <= reference.steps() + kills * STEPS_PER_EPOCH
