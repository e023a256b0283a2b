"""Who is told what happens in a study, besides the person at the terminal: MLflow, the disk, the trials' logs."""

from __future__ import annotations

from dataclasses import replace

from studytool.results import EpochResult, Outcome, TrialRecord
from studytool.spec import Arm, TrialSpec
from studytool.study.events import Observer
from studytool.study.ledger import Ledger
from studytool.study.progress import duration
from studytool.study.tracking import Tracker

LOG = "trial.log"


class TellTracker(Observer):
    """Passes what happens on to MLflow, and the run's id to the ledger."""

    def __init__(self, tracker: Tracker, ledger: Ledger) -> None:
        self._tracker = tracker
        self._ledger = ledger
        self._runs: dict[str, str] = {}

    def trial_started(self, trial: TrialSpec, record: TrialRecord) -> None:
        """Begin the trial's run, or take it up."""
        run = self._runs[record.trial_id] = self._tracker.open_trial(trial, record.config_hash)
        if run not in (record.trial_id, record.mlflow_run):
            self._ledger.put(replace(record, mlflow_run=run))

    def epoch_ended(self, record: TrialRecord, result: EpochResult) -> None:
        """One point of every curve."""
        self._tracker.log_epoch(self._runs[record.trial_id], result)

    def trial_ended(self, record: TrialRecord) -> None:
        """End the run; that of a failed trial gets its log."""
        run = self._runs.pop(record.trial_id)
        if record.outcome is Outcome.FAILED:
            self._tracker.log_file(run, self._ledger.trial_folder(record.trial_id) / LOG)
        self._tracker.close_trial(run, record)


class Housekeeping(Observer):
    """Keeps the disk from filling: what no later step needs is removed as soon as that is certain."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def trial_ended(self, record: TrialRecord) -> None:
        """What the trial needed to go on is of no use any more."""
        patterns = ["last.pt*"] if record.outcome is Outcome.COMPLETE else ["last.pt*", "best.*"]
        self._remove(record, *patterns)

    def arm_decided(self, arm: Arm, best: TrialRecord | None) -> None:
        """Only the best search trial's weights are kept."""
        for record in self._ledger.records:
            if record.arm == arm.name and record.phase == "search" and (not best or record.number != best.number):
                self._remove(record, "last.pt*", "best.*")

    def _remove(self, record: TrialRecord, *patterns: str) -> None:
        folder = self._ledger.trial_folder(record.trial_id)
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink(missing_ok=True)
        if self._ledger.storage is not None:
            self._ledger.storage.remove(f"trials/{record.trial_id}", patterns)


class TrialLogs(Observer):
    """`trial.log` in the trial's folder: one line per epoch, and the traceback of what broke."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def trial_started(self, trial: TrialSpec, record: TrialRecord) -> None:
        """What is tried."""
        parts = f", in {record.parts} parts, as memory was too small" if record.parts else ""
        self._add(record, f"attempt {record.attempts}{parts}: {trial.model_dump_json()}")

    def epoch_ended(self, record: TrialRecord, result: EpochResult) -> None:
        """One line."""
        epoch = result
        self._add(
            record,
            f"epoch {epoch.epoch}  train loss {epoch.train_loss:.4f}  val loss {epoch.val.loss:.4f}  "
            f"val balanced accuracy {epoch.val.balanced_accuracy:.4f}  learning rate {epoch.learning_rate:.3g}  "
            f"after {duration(epoch.cost.seconds)}",
        )

    def attempt_failed(self, record: TrialRecord, message: str, details: str, *, again: bool) -> None:
        """The line and the traceback."""
        self._add(record, f"attempt {record.attempts} broke{', to be tried again' if again else ''}: {message}")
        if details:
            self._add(record, details.rstrip())

    def trial_ended(self, record: TrialRecord) -> None:
        """How it ended."""
        self._add(record, f"{record.outcome} {record.message}".rstrip())

    def _add(self, record: TrialRecord, line: str) -> None:
        path = self._ledger.trial_folder(record.trial_id) / LOG
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        if self._ledger.storage is not None:
            self._ledger.storage.push(f"trials/{record.trial_id}/{LOG}")
