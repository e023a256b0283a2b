"""Who is told what happens in a study, besides the person at the terminal: MLflow, the disk, the trials' logs."""

from __future__ import annotations

from collections.abc import Iterable
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

    def trial_started(self, trial: TrialSpec, record: TrialRecord) -> None:
        """Begin the trial's run, or take it up; the store answers while the trial trains."""
        self._tracker.open_trial(trial, record.config_hash)

    def epoch_ended(self, record: TrialRecord, result: EpochResult) -> None:
        """One point of every curve."""
        keep_run_ids(self._tracker, self._ledger, [record])
        self._tracker.log_epoch(record.trial_id, result)

    def trial_ended(self, record: TrialRecord) -> None:
        """End the run; that of a failed trial gets its log."""
        keep_run_ids(self._tracker, self._ledger, [record])
        if record.outcome is Outcome.FAILED:
            self._tracker.log_file(record.trial_id, self._ledger.trial_folder(record.trial_id) / LOG)
        self._tracker.close_trial(record.trial_id, record)


def keep_run_ids(tracker: Tracker, ledger: Ledger, records: Iterable[TrialRecord]) -> None:
    """Put the ids of the trials' MLflow runs into the ledger that it lacks, as MLflow's answer may come late.

    Or that have changed, as the runs were written anew into a store that had been lost.
    """
    for record in records:
        run, known = tracker.run_id(record.trial_id), ledger.get(record.trial_id)
        if run is None or known is None or run == known.mlflow_run:
            continue
        keep = ledger.note if known.outcome is None else ledger.put
        keep(replace(known, mlflow_run=run))


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
        for record in self._ledger.of_arm(arm.name):
            if record.phase == "search" and (not best or record.number != best.number):
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
