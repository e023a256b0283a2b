"""A whole study, from the study file to the table: the order in which the rooms are visited."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from studytool.data.leakage import check_leakage
from studytool.data.remote_copy import local_copy
from studytool.data.shards import Manifest, open_dataset, read_manifest
from studytool.errors import DataError, WeightsError
from studytool.files import write_text
from studytool.models.weights import fetch_checkpoint, missing_weights
from studytool.remote import is_remote
from studytool.report.compare import ArmSummary, summarize_arms
from studytool.report.table import plain_text, table_notes, table_text
from studytool.results import EpochResult, Outcome, TrialRecord
from studytool.settings import DataSettings, SimulateSettings
from studytool.spec import Arm, StudySpec, TrialSpec
from studytool.study.counting import progress_of
from studytool.study.director import Director, Observer
from studytool.study.environment import describe_environment
from studytool.study.ledger import Ledger
from studytool.study.progress import Progress, duration, say
from studytool.study.tracking import Tracker


@dataclass(frozen=True)
class StudyEnd:
    """How a run of a study ended: its arms as they stand and, if a signal cut it short, that signal's name."""

    summaries: tuple[ArmSummary, ...]
    ended_by: str | None


def run_study(spec: StudySpec, yaml_text: str, console: Console, *, verbose: bool = False) -> StudyEnd:
    """Do what is missing of a study: data, search, confirmation, table.

    Whatever can be found out beforehand is found out before the first trial: data, weights, settings that differ from
    those of existing results.

    Raises:
        StudytoolError: one line that says what has to be mended.
    """
    _check_weights(spec)
    ensure_dataset(spec.data, console)
    folder = local_copy(spec.data.path, look_again=True)
    dataset = open_dataset(folder, spec.data.split)
    notes = check_leakage(dataset).notes
    with (
        closing(Ledger(spec, dataset.fingerprint)) as ledger,
        Tracker(spec.tracking.uri, spec, uid=ledger.uid) as tracker,
    ):
        tracker.open_study(yaml_text, describe_environment(sys.argv), folder / "manifest.json")
        tracker.catch_up(ledger.records)
        ended_by = _run_trials(spec, ledger, tracker, dataset.fingerprint, console, verbose=verbose)
        return _close(spec, ledger, tracker, ended_by, console, notes)


def ensure_dataset(settings: DataSettings, console: Console) -> Manifest:
    """The dataset's manifest; a missing dataset is simulated if the study file says how.

    Raises:
        DataError: no usable dataset is there, or it was simulated in another way than the study file says.
    """
    folder = local_copy(settings.path)
    if settings.simulate is not None and not is_remote(settings.path):
        if not folder.exists():
            _simulate(settings.simulate, folder, console)
        _check_simulated_as_said(settings.simulate, folder)
    return read_manifest(folder)


def _simulate(settings: SimulateSettings, folder: Path, console: Console) -> None:
    from studytool.data.simulate import simulate_dataset

    say(console, f"simulating {folder}")
    with progress_of(console, f"simulating {folder}") as on_progress:
        simulate_dataset(settings, folder, on_progress=on_progress)


def _check_simulated_as_said(settings: SimulateSettings, folder: Path) -> None:
    """A folder that an earlier, other study file made must not pass for what this one describes."""
    provenance = read_manifest(folder).provenance
    if provenance.get("kind") != "simulation":
        return
    there, said = provenance["settings"], settings.model_dump(mode="json")
    for key in said:
        if there.get(key) != said[key]:
            raise DataError(
                f"{folder}: was simulated with {key} = {there.get(key)!r}, data.simulate.{key} now says {said[key]!r}; "
                "choose another data.path, or remove the folder to have it made anew"
            )


def _check_weights(spec: StudySpec) -> None:
    """Stop before the first trial if an arm's pre-trained weights are neither in the cache nor to be had."""
    choices = {
        (trial.model.backbone, trial.model.init)
        for arm in spec.list_arms()
        for trial in [spec.trial(arm, {}, phase="search", number=0, seed=spec.seed)]
    }
    for backbone, init in sorted(choices):
        fetch_checkpoint(init)
        message = missing_weights(backbone, init)
        if message:
            raise WeightsError(message)


def _run_trials(
    spec: StudySpec, ledger: Ledger, tracker: Tracker, fingerprint: str, console: Console, *, verbose: bool
) -> str | None:
    from studytool.study.tuning import plan_slots, ray_session, run_trials

    observers: list[Observer] = [_TellTracker(tracker), _Housekeeping(spec, ledger), _TrialLogs(ledger)]
    director = Director(spec, ledger, fingerprint, observers)
    if director.finished:
        director.announce_decided()
        return None
    left = director.trials_left
    say(
        console,
        f"study {spec.name}: {len(spec.list_arms())} arms, {left['search']} search and {left['confirm']} confirm "
        f"trials to run; results in {spec.folder}",
    )
    with ray_session():
        slots = plan_slots(spec.resources)
        with Progress(spec, console, slots.count, verbose=verbose) as progress:
            observers.append(progress)
            progress.take_up(ledger.records)
            director.announce_decided()
            ended_by = run_trials(director, ledger.trial_folder, slots)
    return ended_by or (None if director.finished else "SIGINT")


def _close(
    spec: StudySpec,
    ledger: Ledger,
    tracker: Tracker,
    ended_by: str | None,
    console: Console,
    data_notes: Sequence[str],
) -> StudyEnd:
    """Write the comparison down, here and in MLflow, with what has to be known of the data; say where to look next."""
    summaries = summarize_arms(spec, ledger.records)
    text = plain_text(summaries, spec) + "".join(f"{note}\n" for note in data_notes)
    write_text(spec.folder / "table.txt", text)
    if any(s.confirmed for s in summaries):
        from studytool.report.plots import accuracy_against_cost, learning_curves

        learning_curves(spec, ledger.records, spec.folder / "curves")
        accuracy_against_cost(spec, summaries, spec.folder / "accuracy_against_cost")
    if ended_by:
        tracker.interrupt()
    for summary in summaries:
        tracker.close_arm(summary)
    winner = next((s for s in summaries if s.is_winner), None)
    if winner and winner.best_trial:
        tracker.log_checkpoint(winner.best_trial, ledger.trial_folder(winner.best_trial))
    tracker.close_study(text, "INTERRUPTED" if ended_by else "COMPLETE")
    console.print()
    if console.is_terminal:
        console.print(table_text(summaries, spec))
        for note in (*table_notes(summaries, spec), *data_notes):
            say(console, note)
    else:
        say(console, text)
    say(console, f"table and figures: {spec.folder}")
    say(console, f"compare the runs:  {tracker.how_to_look}")
    if winner and winner.best_trial:
        say(console, f"best checkpoint:   {spec.folder / 'trials' / winner.best_trial / 'best.safetensors'}")
    if ended_by:
        say(console, f"ended by {ended_by}; the same command goes on where the study stopped")
    return StudyEnd(summaries, ended_by)


class _TellTracker:
    """Passes what happens on to MLflow."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._runs: dict[str, str] = {}

    def trial_started(self, trial: TrialSpec, record: TrialRecord) -> None:
        self._runs[record.trial_id] = self._tracker.open_trial(trial, record.config_hash)

    def epoch_ended(self, record: TrialRecord, result: EpochResult) -> None:
        self._tracker.log_epoch(self._runs[record.trial_id], result)

    def trial_ended(self, record: TrialRecord) -> None:
        self._tracker.close_trial(self._runs.pop(record.trial_id), record)

    def arm_decided(self, arm: Arm, best: TrialRecord | None) -> None:
        pass


class _Housekeeping:
    """Keeps the disk from filling: what no later step needs is removed as soon as that is certain."""

    def __init__(self, spec: StudySpec, ledger: Ledger) -> None:
        self._ledger = ledger

    def trial_started(self, trial: TrialSpec, record: TrialRecord) -> None:
        pass

    def epoch_ended(self, record: TrialRecord, result: EpochResult) -> None:
        pass

    def trial_ended(self, record: TrialRecord) -> None:
        patterns = ["last.pt*"] if record.outcome is Outcome.COMPLETE else ["last.pt*", "best.*"]
        self._remove(record, *patterns)

    def arm_decided(self, arm: Arm, best: TrialRecord | None) -> None:
        for record in self._ledger.records:
            if record.arm == arm.name and record.phase == "search" and record != best:
                self._remove(record, "last.pt*", "best.*")

    def _remove(self, record: TrialRecord, *patterns: str) -> None:
        folder = self._ledger.trial_folder(record.trial_id)
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink(missing_ok=True)


class _TrialLogs:
    """One line per epoch in `trial.log` in the trial's folder."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def trial_started(self, trial: TrialSpec, record: TrialRecord) -> None:
        self._add(record, f"attempt {record.attempts}: {trial.model_dump_json()}")

    def epoch_ended(self, record: TrialRecord, result: EpochResult) -> None:
        epoch = result
        self._add(
            record,
            f"epoch {epoch.epoch}  train loss {epoch.train_loss:.4f}  val loss {epoch.val.loss:.4f}  "
            f"val balanced accuracy {epoch.val.balanced_accuracy:.4f}  learning rate {epoch.learning_rate:.3g}  "
            f"after {duration(epoch.cost.seconds)}",
        )

    def trial_ended(self, record: TrialRecord) -> None:
        self._add(record, f"{record.outcome} {record.message}".rstrip())

    def arm_decided(self, arm: Arm, best: TrialRecord | None) -> None:
        pass

    def _add(self, record: TrialRecord, line: str) -> None:
        path = self._ledger.trial_folder(record.trial_id) / "trial.log"
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


SIGNAL_EXIT_CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 75}
