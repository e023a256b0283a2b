from __future__ import annotations

import io
import json
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import textwrap
import time
from collections import Counter
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
from fabricated_study import (
    CLASSES,
    RANDOM,
    WHOLE,
    YAML,
    make_epochs,
    make_manifest,
    make_record,
    make_spec,
    make_trials,
)
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED
from mlflow_server import free_port, server

from studytool.errors import StudytoolError
from studytool.report.compare import summarize_arms
from studytool.results import Cost, Outcome
from studytool.study.ledger import Ledger
from studytool.study.observers import TellTracker, keep_run_ids
from studytool.study.records import new_record
from studytool.study.tracking import Tracker
from studytool.study.tracking.logged import parameter_text, parameter_texts
from studytool.study.tracking.store import absolute_uri, open_client, open_experiment
from studytool.study.tracking.writer import Writer

SMALL = YAML.replace("[none, stem]", "[none]").replace("  - {init: random, freeze: stem}", "  - {freeze: stem}")
SMALL = SMALL.replace("exclude:\n  - {freeze: stem}\n", "").replace("{seeds: 3}", "{seeds: 2}")
ENVIRONMENT = {"version.torch": "2.15.0", "code.commit": "0123abc", "machine.processor": "a processor"}


@pytest.fixture(scope="module")
def new_store(tmp_path_factory) -> tuple[Path, str, str]:
    """A folder where a tracker made its store, what it said, and how it tells to look; making a store takes seconds."""
    folder, before, said = tmp_path_factory.mktemp("new"), Path.cwd(), io.StringIO()
    os.chdir(folder)
    with redirect_stdout(said), redirect_stderr(said):
        tracker = Tracker("sqlite:///kept here/mlflow.db", make_spec(folder, SMALL, name="first"))
        tracker.close()
    os.chdir(before)
    return folder, said.getvalue(), tracker.how_to_look


@pytest.fixture(scope="module")
def empty_store(new_store) -> Path:
    """A store with its tables, and none of the study's runs."""
    return new_store[0] / "kept here" / "mlflow.db"


@pytest.fixture
def place(tmp_path, monkeypatch, empty_store) -> Place:
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return Place(tmp_path)


class Place:
    """A folder with a small study, its made-up trials and an SQLite store."""

    def __init__(self, folder: Path, uri: str = "sqlite:///mlflow.db") -> None:
        self.folder = folder
        self.uri = uri
        self.spec = make_spec(folder, SMALL)
        self.trials = make_trials(self.spec)
        self.records = [record for _, record in self.trials]
        self.warnings: list[str] = []

    @property
    def confirm(self):
        return next((trial, record) for trial, record in self.trials if record.phase == "confirm")

    @contextmanager
    def tracker(self, uid: str | None = None):
        """A tracker with its study open, closed at the end; nothing may be left unwritten."""
        with Tracker(self.uri, self.spec, uid=uid, warn=self.warnings.append) as tracker:
            tracker.open_study(SMALL, ENVIRONMENT, make_manifest(self.folder))
            yield tracker

    def log_whole_study(self) -> None:
        with self.tracker() as tracker:
            for trial, record in self.trials:
                run_id = opened(tracker, trial, record.config_hash)
                for result in record.epochs:
                    tracker.log_epoch(run_id, result)
                tracker.close_trial(run_id, record)
            for summary in summarize_arms(self.spec, self.records):
                tracker.close_arm(summary)
            tracker.close_study("arm   test\nfirst  0.9\n", "COMPLETE")

    def runs(self) -> dict[str, object]:
        """The study's runs by name; two of one name would be an error."""
        client = open_client(absolute_uri(self.uri))
        experiment = client.get_experiment_by_name(self.spec.name)
        runs = client.search_runs([experiment.experiment_id], max_results=1000)
        names = Counter(run.data.tags["studytool.name"] for run in runs)
        assert set(names.values()) <= {1}, names
        return {run.data.tags["studytool.name"]: run for run in runs}

    def history(self, run, metric: str) -> list[tuple[int, float]]:
        client = open_client(absolute_uri(self.uri))
        return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, metric)]

    def assert_no_point_twice(self) -> None:
        with sqlite3.connect(self.folder / "mlflow.db") as database:
            doubles = database.execute(
                "SELECT key, step, count(*) FROM metrics GROUP BY 1, 2, run_uuid HAVING count(*) > 1"
            )
            assert doubles.fetchall() == []


@pytest.fixture(scope="module")
def finished(tmp_path_factory, empty_store):
    """A study logged from beginning to end, read by several tests and changed by none."""
    folder = tmp_path_factory.mktemp("finished")
    before = Path.cwd()
    os.chdir(folder)
    shutil.copy(empty_store, folder / "mlflow.db")
    place = Place(folder)
    place.log_whole_study()
    assert place.warnings == []
    yield place
    os.chdir(before)


# Addresses


def test_a_relative_path_counts_from_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("sqlite:///mlflow.db") == f"sqlite:///{tmp_path}/mlflow.db"
    assert absolute_uri("sqlite:///a b/../c%20d.db") == f"sqlite:///{tmp_path}/c%20d.db"
    assert absolute_uri(f"sqlite:///{tmp_path}/x.db") == f"sqlite:///{tmp_path}/x.db"


@pytest.mark.parametrize("uri", ["http://localhost:5000", "https://lab.example/mlflow", "postgresql+psycopg2://u@h/db"])
def test_servers_pass(uri):
    assert absolute_uri(uri) == uri


@pytest.mark.parametrize(
    "uri", ["./mlruns", "mlruns", "/data/runs", "file:///data/runs", "sqlite://", "sqlite:///", "sqlite:///:memory:",
            "sqlite:///a?b.db", "gopher://lab"]
)  # fmt: skip
def test_what_is_no_store_is_refused_with_what_to_write(uri):
    with pytest.raises(StudytoolError, match=r"tracking\.uri.*sqlite:///mlflow\.db.*http://HOST:PORT") as caught:
        absolute_uri(uri)
    assert "\n" not in str(caught.value)
    assert uri in str(caught.value)


def test_a_folder_or_another_file_in_the_stores_place_is_refused_and_kept(tmp_path):
    spec = make_spec(tmp_path)
    with pytest.raises(StudytoolError, match="is a folder"):
        Tracker(f"sqlite:///{tmp_path}", spec)
    other = tmp_path / "notes.db"
    for content in (b"not a database, but somebody's notes", b"SQLite format 3\0" + b"\xff" * 4096):
        other.write_bytes(content)
        with pytest.raises(StudytoolError, match=r"notes\.db cannot be read as an SQLite database"):
            Tracker(f"sqlite:///{other}", spec)
        assert other.read_bytes() == content


def test_what_a_killed_process_had_written_by_half_is_taken_back(place):
    def names() -> list[str]:
        with closing(sqlite3.connect("mlflow.db")) as database:
            return [name for (name,) in database.execute("SELECT name FROM experiments")]

    Tracker(place.uri, place.spec).close()
    before = names()
    killed = """
        import os, signal, sqlite3
        database = sqlite3.connect("mlflow.db", isolation_level=None)
        database.execute("PRAGMA cache_size = 1")  # what is written goes to the file before the transaction ends
        database.execute("BEGIN")
        database.executemany("INSERT INTO experiments (name) VALUES (?)", ((f"{i}" * 200,) for i in range(1000)))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(killed)], check=False)
    assert Path("mlflow.db-journal").stat().st_size > 0
    Tracker(place.uri, place.spec).close()
    assert names() == before


def test_a_store_of_another_mlflow_version_is_refused_with_what_to_do(place):
    with sqlite3.connect("mlflow.db") as database:
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    with pytest.raises(StudytoolError, match=r"another MLflow version.*mlflow db upgrade"):
        Tracker(place.uri, place.spec)


@pytest.mark.slow
def test_a_store_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path):
    script = """
import resource, signal, sys
from pathlib import Path
from studytool.errors import StudytoolError
from studytool.study.tracking.store import open_client
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    open_client(f"sqlite:///{Path.cwd()}/mlflow.db")
except StudytoolError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith(f"tracking.uri: MLflow at sqlite:///{tmp_path}/mlflow.db: "), done.stderr[-500:]
    assert len(done.stdout.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db.lock"]


def test_a_server_that_is_not_there_is_refused_with_what_to_do(place):
    with pytest.raises(StudytoolError, match=r"127\.0\.0\.1:9.*start the server, or set tracking\.uri") as caught:
        Tracker("http://127.0.0.1:9", place.spec)
    assert "\n" not in str(caught.value)


def test_importing_the_tracker_does_not_import_mlflow():
    code = "import sys, studytool.study.tracking; print([m for m in ('mlflow', 'torch', 'ray') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# A new store


def test_a_new_store_is_private_and_silent(new_store):
    folder, said, how_to_look = new_store
    assert stat.S_IMODE((folder / "kept here").stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "kept here" / "mlflow.db").stat().st_mode) == 0o600
    assert stat.S_IMODE((folder / "studies" / "first" / "mlflow").stat().st_mode) == 0o700
    assert not (folder / "mlruns").exists()
    assert sorted(p.name for p in (folder / "kept here").iterdir()) == ["mlflow.db", "mlflow.db.lock"]
    assert said == ""
    assert how_to_look.startswith("studytool ui ")
    assert how_to_look.endswith("/studies/first")


EIGHT_STARTS = """
import multiprocessing, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
import mlflow  # once, before the processes part: they shall meet at the store, not wait for imports
from fabricated_study import make_manifest, make_spec
from studytool.study.records import new_record
from studytool.study.ledger import Ledger
from studytool.study.observers import TellTracker, keep_run_ids
from studytool.study.tracking import Tracker

def start(number, barrier):
    own = Path(f"own{number}")
    own.mkdir()
    spec = make_spec(own, name=f"study{min(number, 6)}")  # the last two have one name
    barrier.wait(60)
    with Tracker("sqlite:///mlflow.db", spec) as tracker:
        tracker.open_study("", {}, make_manifest(own))

context = multiprocessing.get_context("fork")
barrier = context.Barrier(8)
processes = [context.Process(target=start, args=(number, barrier)) for number in range(8)]
for process in processes:
    process.start()
for process in processes:
    process.join()
print([process.exitcode for process in processes])
"""


@pytest.mark.slow
def test_eight_first_starts_at_once_on_one_new_store(tmp_path):
    command = [sys.executable, "-c", EIGHT_STARTS, str(Path(__file__).parents[1])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert (done.stdout.strip(), done.stderr) == (str([0] * 8), "")
    client = open_client(f"sqlite:///{tmp_path}/mlflow.db")
    assert {e.name for e in client.search_experiments()} == {"Default", *(f"study{i}" for i in range(7))}


# A whole study


def test_every_trial_has_one_run_below_its_arm_below_the_study(finished):
    runs = finished.runs()
    arms = [arm.name for arm in finished.spec.list_arms()]
    assert set(runs) == {"fabricated", *arms, *(record.trial_id for record in finished.records)}
    above = {name: run.data.tags.get("mlflow.parentRunId") for name, run in runs.items()}
    assert above["fabricated"] is None
    assert {above[arm] for arm in arms} == {runs["fabricated"].info.run_id}
    for record in finished.records:
        assert above[record.trial_id] == runs[record.arm].info.run_id
    kinds = Counter(run.data.tags["studytool.kind"] for run in runs.values())
    assert kinds == {"study": 1, "arm": 2, "trial": 12}
    assert runs[f"{RANDOM}.search-003"].info.run_name == f"search-003 {RANDOM}"
    assert runs[RANDOM].info.run_name == RANDOM


def test_runs_end_with_their_true_outcome(finished):
    runs = finished.runs()
    status = {Outcome.COMPLETE: "FINISHED", Outcome.PRUNED: "KILLED", Outcome.FAILED: "FAILED"}
    for record in finished.records:
        run = runs[record.trial_id]
        assert run.info.status == status[record.outcome]
        assert run.data.tags["studytool.outcome"] == record.outcome
        assert run.info.end_time is not None
    failed = next(r for r in finished.records if r.outcome is Outcome.FAILED)
    assert runs[failed.trial_id].data.tags["studytool.message"] == "epoch 2: the training loss is nan"
    assert runs["fabricated"].info.status == "FINISHED"
    assert runs[RANDOM].data.tags["studytool.outcome"] == "COMPLETE"


def test_parameters_stand_under_flat_names(finished):
    trial, record = finished.confirm
    parameters = finished.runs()[record.trial_id].data.params
    assert parameters["backbone"] == "r2plus1d_18"
    assert parameters["learning_rate"] == "0.001"
    assert parameters["augment"] == "turns, shift"
    assert parameters["gradient_clip"] == "none"
    assert parameters["seed"] == str(trial.seed)
    assert parameters["phase"] == "confirm"
    assert parameters["arm"] == record.arm
    assert set(parameters) == {*trial.parameters, "seed", "phase", "arm"}
    assert finished.runs()[WHOLE].data.params == {
        "backbone": "r2plus1d_18", "init": "kinetics400", "freeze": "none", "arm": WHOLE,
    }  # fmt: skip


def test_curves_have_each_epoch_once_with_its_values(finished):
    _, record = finished.confirm
    run = finished.runs()[record.trial_id]
    for metric, value_of in {
        "val/balanced_accuracy": lambda e: e.val.balanced_accuracy,
        "val/macro_auc": lambda e: e.val.macro_auc,
        "train/loss": lambda e: e.train_loss,
        "train/learning_rate": lambda e: e.learning_rate,
        "cost/device_seconds": lambda e: e.cost.device_seconds,
        "cost/samples": lambda e: e.cost.samples,
        "best/value": lambda e: e.best_value,
    }.items():
        assert finished.history(run, metric) == [(e.epoch, pytest.approx(value_of(e))) for e in record.epochs]
    assert "cost/energy_joules" not in run.data.metrics
    finished.assert_no_point_twice()


def test_final_values_and_what_was_not_reached(finished):
    runs = finished.runs()
    reached = next(r for r in finished.records if r.arm == WHOLE and r.phase == "confirm")
    never = next(r for r in finished.records if r.arm == RANDOM and r.phase == "confirm")
    metrics = runs[reached.trial_id].data.metrics
    assert metrics["test/balanced_accuracy"] == pytest.approx(reached.test.balanced_accuracy)
    first = next(e for e in reached.epochs if e.best_value >= 0.7)
    assert metrics["target/censored"] == 0
    assert metrics["target/device_seconds"] == pytest.approx(first.cost.device_seconds)
    assert runs[never.trial_id].data.metrics["target/censored"] == 1
    assert "target/device_seconds" not in runs[never.trial_id].data.metrics
    pruned = next(r for r in finished.records if r.outcome is Outcome.PRUNED)
    assert not [name for name in runs[pruned.trial_id].data.metrics if name.startswith(("test/", "target/"))]


def test_arms_have_their_means_in_the_columns_of_the_trials(finished):
    summary = next(s for s in summarize_arms(finished.spec, finished.records) if s.arm == WHOLE)
    run = finished.runs()[WHOLE]
    mean = summary.test["balanced_accuracy"]
    assert run.data.metrics["test/balanced_accuracy"] == pytest.approx(mean.mean)
    assert run.data.metrics.get("test/balanced_accuracy.low") == mean.low  # None where the seeds are alike
    assert run.data.metrics["cost/device_seconds"] == pytest.approx(summary.mean_confirm_cost.device_seconds)
    assert run.data.metrics["cost_of_all_trials/device_seconds"] == pytest.approx(summary.cost.device_seconds)
    assert run.data.metrics["trials/pruned"] == 1
    assert run.data.tags["studytool.winner"] == "true"
    assert run.data.tags["studytool.best.learning_rate"] == "0.001"


def test_artifacts_say_how_the_study_was_made_and_what_it_found(finished):
    runs = finished.runs()
    folder = finished.folder / "studies" / "fabricated" / "mlflow"
    study = folder / runs["fabricated"].info.run_id / "artifacts"
    assert (study / "study.yaml").read_text() == SMALL
    assert json.loads((study / "environment.json").read_text()) == ENVIRONMENT
    assert json.loads((study / "dataset" / "manifest.json").read_text())["classes"] == list(CLASSES)
    assert (study / "summary.txt").read_text().startswith("arm   test\n")
    assert runs["fabricated"].data.tags["environment.version.torch"] == "2.15.0"
    assert runs["fabricated"].data.tags["mlflow.source.git.commit"] == "0123abc"
    for record in finished.records:
        files = {p.name for p in (folder / runs[record.trial_id].info.run_id).glob("artifacts/*")}
        assert files == ({"confusion.png"} if record.phase == "confirm" else set())


# Taking a study up again


@pytest.mark.slow
def test_taking_up_a_finished_study_adds_no_run_and_no_point(place, finished):
    shutil.copy(finished.folder / "mlflow.db", place.folder)
    before = {name: (run.info.run_id, run.data.params, run.data.metrics) for name, run in place.runs().items()}
    place.log_whole_study()
    assert {name: (run.info.run_id, run.data.params, run.data.metrics) for name, run in place.runs().items()} == before
    place.assert_no_point_twice()
    assert place.warnings == []


def test_a_driver_that_was_killed_leaves_runs_that_are_taken_up_again(place):
    trial, record = place.confirm
    with place.tracker() as tracker:  # closes its queue, but not its runs: as SIGKILL leaves them
        first = opened(tracker, trial, record.config_hash)
        for result in record.epochs[:3]:
            tracker.log_epoch(first, result)
    assert place.runs()[trial.trial_id].info.status == "RUNNING"
    with place.tracker() as tracker:
        tracker._outbox.ask("until all is written", lambda: None, timeout_seconds=60)
        assert place.runs()[trial.trial_id].info.status == "KILLED"
        assert place.runs()[trial.trial_id].data.tags["studytool.outcome"] == "INTERRUPTED"
        again = opened(tracker, trial, record.config_hash)
        assert place.runs()[trial.trial_id].info.status == "RUNNING"
        for result in record.epochs[2:]:
            tracker.log_epoch(again, result)
        tracker.close_trial(again, record)
    run = place.runs()[trial.trial_id]
    assert again == first
    assert run.info.status == "FINISHED"
    assert run.data.tags["studytool.outcome"] == "COMPLETE"
    assert [step for step, _ in place.history(run, "val/loss")] == [1, 2, 3, 4, 5, 6]
    place.assert_no_point_twice()


@pytest.mark.slow
def test_what_never_came_through_is_filled_in_from_the_ledger(place, finished):
    interrupted = replace(place.records[1], outcome=None, epochs=place.records[1].epochs[:4])
    records = [interrupted if r.trial_id == interrupted.trial_id else r for r in place.records]
    with place.tracker() as tracker:
        tracker.catch_up(records)
    with place.tracker() as tracker:
        tracker.catch_up(records)
    filled, wanted = place.runs(), finished.runs()
    for record in records:
        run, other = filled[record.trial_id], wanted[record.trial_id]
        assert run.data.params == other.data.params
        if record is interrupted:
            assert (run.info.status, run.data.tags["studytool.outcome"]) == ("KILLED", "INTERRUPTED")
            assert [step for step, _ in place.history(run, "train/loss")] == [1, 2, 3, 4]
        else:
            assert run.info.status == other.info.status
            assert run.data.metrics == pytest.approx(other.data.metrics)
    place.assert_no_point_twice()
    assert place.warnings == []


def test_closing_a_trial_fills_in_epochs_that_were_left_out(place):
    trial, record = place.confirm
    with place.tracker() as tracker:
        run_id = opened(tracker, trial, record.config_hash)
        tracker.log_epoch(run_id, record.epochs[1])
        tracker.close_trial(trial.trial_id, record)
    history = place.history(place.runs()[trial.trial_id], "best/value")
    assert sorted(step for step, _ in history) == [1, 2, 3, 4, 5, 6]


def test_a_parameter_that_changed_is_refused_with_what_to_do(place):
    trial, record = place.confirm
    with place.tracker() as tracker:
        tracker.open_trial(trial, record.config_hash)
    changed = trial.model_copy(update={"seed": trial.seed + 1})
    message = rf"{trial.trial_id} with seed = {trial.seed}, now it is {trial.seed + 1}; give the study another name"
    with place.tracker() as tracker, pytest.raises(StudytoolError, match=message):
        opened(tracker, changed, record.config_hash)


def test_a_study_begun_anew_does_not_continue_the_runs_of_the_old_one(place):
    trial, record = place.confirm
    with place.tracker(uid="first") as tracker:
        first = opened(tracker, trial, record.config_hash)
    with place.tracker(uid="second") as tracker:
        second = opened(tracker, trial.model_copy(update={"seed": 5}), record.config_hash)
    with place.tracker(uid="first") as tracker:
        assert opened(tracker, trial, record.config_hash) == first
    assert first != second


def test_a_deleted_experiment_is_restored_and_said_so(place):
    with place.tracker() as tracker:
        study = tracker.open_study(SMALL, ENVIRONMENT, make_manifest(place.folder))
    open_client(absolute_uri(place.uri)).delete_experiment(tracker.experiment_id)
    with place.tracker() as tracker:
        assert tracker.open_study(SMALL, ENVIRONMENT, make_manifest(place.folder)) == study
    assert place.warnings == ["MLflow: the experiment 'fabricated' was deleted; it is restored"]


def test_the_ledger_learns_a_run_id_that_comes_late_at_the_next_epoch_or_at_the_end(place):
    (first, epochs), (second, _) = ((trial, record.epochs) for trial, record in place.trials[:2])
    with closing(Ledger(place.spec, "data")) as ledger:
        with place.tracker() as tracker:
            tell = TellTracker(tracker, ledger)
            for trial in (first, second):
                tell.trial_started(trial, ledger.put(new_record(trial, "data")))
            assert ledger.get(second.trial_id).mlflow_run == ""
            while tracker.run_id(first.trial_id) is None:
                time.sleep(0.01)
            tell.epoch_ended(ledger.add_epoch(first.trial_id, epochs[0]), epochs[0])
            assert ledger.get(first.trial_id).mlflow_run == tracker.run_id(first.trial_id)
        keep_run_ids(tracker, ledger, ledger.records)
        ids = {name: run.info.run_id for name, run in place.runs().items()}
        assert [r.mlflow_run for r in ledger.records] == [ids[r.trial_id] for r in ledger.records]
        assert len(ledger.records) == 2


def test_an_interruption_leaves_nothing_running(place):
    trial, record = place.confirm
    with place.tracker() as tracker:
        done = opened(tracker, *_opening(place.trials[0]))
        tracker.close_trial(done, place.trials[0][1])
        tracker.log_epoch(opened(tracker, trial, record.config_hash), record.epochs[0])
        tracker.interrupt()
        for summary in summarize_arms(place.spec, place.records[:3]):
            tracker.close_arm(summary)
        tracker.close_study("so far", "INTERRUPTED")
    runs = place.runs()
    assert {run.info.status for run in runs.values()} == {"KILLED", "FINISHED"}
    assert runs[place.trials[0][0].trial_id].info.status == "FINISHED"
    for name in (trial.trial_id, trial.arm, "fabricated"):
        assert (runs[name].info.status, runs[name].data.tags["studytool.outcome"]) == ("KILLED", "INTERRUPTED")
    assert [step for step, _ in place.history(runs[trial.trial_id], "val/loss")] == [1]


def test_an_error_in_the_driver_leaves_nothing_running(place):
    trial, record = place.confirm

    def driver() -> None:
        with place.tracker() as tracker:
            tracker.log_epoch(opened(tracker, trial, record.config_hash), record.epochs[0])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        driver()
    assert {run.info.status for run in place.runs().values()} == {"KILLED"}


# Single records


def test_values_that_are_not_finite_are_not_sent(place):
    trial, record = place.trials[0]
    first = record.epochs[0]
    odd = replace(
        first,
        train_loss=float("nan"),
        val=replace(first.val, loss=float("inf"), macro_auc=None),
        cost=replace(first.cost, energy_joules=12.5),
    )
    with place.tracker() as tracker:
        tracker.log_epoch(opened(tracker, trial, record.config_hash), odd)
    metrics = place.runs()[trial.trial_id].data.metrics
    assert not {"train/loss", "val/loss", "val/macro_auc"} & set(metrics)
    assert metrics["cost/energy_joules"] == 12.5
    assert metrics["val/accuracy"] == pytest.approx(first.val.accuracy)
    assert place.warnings == []


def test_a_trial_that_failed_before_its_first_epoch_is_closed(place):
    trial, _ = place.trials[0]
    record = make_record(trial, Outcome.FAILED, (), "out of memory; " + 10_000 * "x")
    with place.tracker() as tracker:
        tracker.close_trial(opened(tracker, trial, record.config_hash), record)
    run = place.runs()[trial.trial_id]
    assert run.info.status == "FAILED"
    assert run.data.tags["studytool.message"].startswith("out of memory; xxx")
    assert place.warnings == []


def test_a_store_that_refuses_a_trials_run_does_not_stop_the_study(place, monkeypatch):
    """As when a token has expired: what is missing is filled in by the next driver."""
    (refused, record), (taken, other) = place.trials[:2]
    with place.tracker() as tracker:
        create = tracker._writer._client.create_run

        def forbidden(*words: object, **options: object) -> None:
            raise MlflowException("the token has expired", error_code=PERMISSION_DENIED)

        opened(tracker, taken, other.config_hash)
        monkeypatch.setattr(tracker._writer._client, "create_run", forbidden)
        tracker.open_trial(refused, record.config_hash)
        assert tracker.run_id(refused.trial_id, timeout_seconds=60) is None
        tracker.log_epoch(refused.trial_id, record.epochs[0])
        tracker.close_trial(refused.trial_id, record)
        monkeypatch.setattr(tracker._writer._client, "create_run", create)
        tracker.close_trial(taken.trial_id, other)
    assert len(place.warnings) == 2
    assert f"refuses the run of {refused.trial_id} (the token has expired)" in place.warnings[0]
    assert "lacks 1 record" in place.warnings[1]
    assert taken.trial_id in place.runs()
    assert refused.trial_id not in place.runs()
    with place.tracker() as tracker:
        tracker.catch_up([record, other])
    assert refused.trial_id in place.runs()


def test_the_checkpoint_is_uploaded_and_a_missing_one_is_said(place):
    trial, record = place.confirm
    folder = place.folder / "trial"
    folder.mkdir()
    with Tracker(place.uri, place.spec, warn=place.warnings.append) as tracker:
        tracker.open_study(SMALL, ENVIRONMENT, make_manifest(place.folder))
        run_id = opened(tracker, trial, record.config_hash)
        tracker.log_checkpoint(run_id, folder)
        tracker._outbox.ask("until it is refused", lambda: None, timeout_seconds=60)
        (folder / "best.safetensors").write_bytes(b"weights")
        (folder / "best.json").write_text("{}")
        tracker.log_checkpoint(trial.trial_id, folder)
    uploaded = place.folder / "studies" / "fabricated" / "mlflow" / run_id / "artifacts" / "checkpoint"
    assert (uploaded / "best.safetensors").read_bytes() == b"weights"
    assert (uploaded / "best.json").read_text() == "{}"
    assert len(place.warnings) == 2
    assert "best.safetensors is not there" in place.warnings[0]
    assert "lacks 1 record" in place.warnings[1]


def test_a_manifest_that_cannot_be_read_is_refused(place):
    with Tracker(place.uri, place.spec) as tracker, pytest.raises(StudytoolError, match=r"gone\.json: no dataset"):
        tracker.open_study(SMALL, ENVIRONMENT, place.folder / "gone.json")


def test_more_than_a_hundred_and_very_long_parameters(place):
    client = open_client(absolute_uri(place.uri))
    experiment = open_experiment(client, absolute_uri(place.uri), place.spec, place.warnings.append)
    writer = Writer(client, place.uri, experiment, place.spec, None)
    writer.open_study("", {}, make_manifest(place.folder), CLASSES, 1)
    values = {f"factor_{i:03d}": i for i in range(250)} | {"arm": RANDOM, "phase": "search", "long": "y" * 20_000}
    run_id = writer.open_trial("many", values, "hash", 1)
    parameters = client.get_run(run_id).data.params
    assert len(parameters) == 253
    assert parameters["factor_249"] == "249"
    assert len(parameters["long"]) <= 500
    with pytest.raises(StudytoolError, match="with long = "):  # though it differs only where it was cut off
        writer.open_trial("many", values | {"long": "y" * 19_999 + "z"}, "hash", 1)


def test_parameters_are_texts_as_a_study_file_writes_them():
    assert [parameter_text(v) for v in (1e-05, True, None, "sum", ("a", "b"), ["a", "b"], (), "")] == [
        "1e-05", "true", "none", "sum", "a, b", "a, b", "none", "none",
    ]  # fmt: skip
    assert parameter_texts({"a": "x" * 500}) == {"a": "x" * 500}


class BreaksOff:
    """A client whose connection breaks right after the store has done what it was asked for, once for each call."""

    def __init__(self, client, *names: str) -> None:
        self._client = client
        self._left = list(names)

    def __getattr__(self, name: str):
        call = getattr(self._client, name)
        if name not in self._left:
            return call

        def break_off(*arguments, **options):
            call(*arguments, **options)
            self._left.remove(name)
            raise ConnectionError("the answer never came")

        return break_off


def test_a_call_that_breaks_off_after_it_was_done_is_not_done_twice(place):
    client = open_client(absolute_uri(place.uri))
    experiment = open_experiment(client, absolute_uri(place.uri), place.spec, place.warnings.append)
    broken = BreaksOff(client, *3 * ["create_run"], *12 * ["log_batch"], "set_terminated", "log_artifacts")
    writer = Writer(broken, place.uri, experiment, place.spec, None)

    def until_done(call, *arguments):
        for _ in range(30):
            try:
                return call(*arguments)
            except ConnectionError:
                pass
        raise AssertionError("it never came through")

    trial, record = place.confirm
    values = {**trial.parameters, "seed": trial.seed, "phase": trial.phase, "arm": trial.arm}
    until_done(writer.open_study, SMALL, ENVIRONMENT, make_manifest(place.folder), CLASSES, 1)
    until_done(writer.open_trial, trial.trial_id, values, record.config_hash, 2)
    for now, result in enumerate(record.epochs[:3]):
        until_done(writer.log_epochs, trial.trial_id, [result], now)
    until_done(writer.close_trial, trial.trial_id, record, 9)
    assert broken._left == []
    runs = place.runs()
    assert set(runs) == {"fabricated", trial.arm, trial.trial_id}
    assert [step for step, _ in place.history(runs[trial.trial_id], "val/loss")] == [1, 2, 3, 4, 5, 6]
    place.assert_no_point_twice()


# A server


@pytest.mark.slow
def test_a_server_that_is_away_for_a_while_misses_nothing(place):
    port = free_port()
    remote = Place(place.folder, f"http://127.0.0.1:{port}")
    before, during, after = remote.trials[1], remote.trials[4], remote.trials[5]
    tracker = None
    with server(place.folder, port):
        tracker = Tracker(remote.uri, remote.spec, warn=remote.warnings.append)
        tracker.open_study(SMALL, ENVIRONMENT, make_manifest(place.folder))
        assert tracker.how_to_look == f"http://127.0.0.1:{port}/#/experiments/{tracker.experiment_id}"
        first = opened(tracker, *_opening(before))
        for result in before[1].epochs[:2]:
            tracker.log_epoch(first, result)
    for result in before[1].epochs[2:]:
        tracker.log_epoch(first, result)
    tracker.close_trial(first, before[1])
    tracker.open_trial(*_opening(during))
    key = during[0].trial_id
    assert tracker.run_id(key) is None, "while the server is away a trial goes by its own id"
    for result in during[1].epochs:
        tracker.log_epoch(key, result)
    begun = time.monotonic()
    tracker.close_trial(key, during[1])
    tracker.open_trial(*_opening(after))
    assert time.monotonic() - begun < 4, "training waited for a store that is known to be away"
    time.sleep(5)
    with server(place.folder, port):
        for result in after[1].epochs:
            tracker.log_epoch(after[0].trial_id, result)
        tracker.close_trial(after[0].trial_id, after[1])
        tracker.close(90)
        runs = remote.runs()
        for _, record in (before, during, after):
            run = runs[record.trial_id]
            assert run.data.tags["studytool.outcome"] == "COMPLETE"
            history = remote.history(run, "val/balanced_accuracy")
            assert history == [(e.epoch, pytest.approx(e.val.balanced_accuracy)) for e in record.epochs]
    place.assert_no_point_twice()
    assert len(remote.warnings) == 1
    assert "does not answer" in remote.warnings[0]


def _opening(pair):
    trial, record = pair
    return trial, record.config_hash


def opened(tracker, trial, config_hash) -> str:
    """The id of the run that a trial is given."""
    tracker.open_trial(trial, config_hash)
    run_id = tracker.run_id(trial.trial_id, timeout_seconds=60)
    assert run_id is not None
    return run_id


def test_costs_that_are_zero_are_sent_as_zero(place):
    trial, record = place.trials[0]
    epoch = replace(make_epochs(trial, 0.5)[0], cost=Cost())
    with place.tracker() as tracker:
        tracker.log_epoch(opened(tracker, trial, record.config_hash), epoch)
    assert place.runs()[trial.trial_id].data.metrics["cost/device_seconds"] == 0
