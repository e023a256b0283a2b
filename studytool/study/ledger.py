"""The truth about a study: one small JSON file for the study and one per trial, each replaced whole.

    studies/NAME/study.json                     format, uid, and the settings that every result depends on
    studies/NAME/trials/TRIAL/record.json       the trial's TrialRecord
    studies/NAME/trials/TRIAL/{last.pt, best.safetensors, trial.log, …}

A file carries the SHA-256 of its content, and the generation before it stays beside it as `*.previous`: a damaged
file is read from there, and if both are damaged the study is refused, never silently begun again. The cost of writing
does not grow with the number of trials.
"""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from studytool.errors import StudytoolError
from studytool.results import Cost, DeviceInfo, EpochResult, Outcome, TrialRecord, to_dict
from studytool.settings import HANDLING
from studytool.spec import StudySpec
from studytool.study.choices import Choices
from studytool.study.extending import first_forbidden_change
from studytool.study.heartbeat import Heartbeat, wait_for_another
from studytool.study.records import copy_to_previous, in_order, read_record, read_state, record_files, write_state
from studytool.study.storage import HEAVY, Lease, Storage

FORMAT = 1
LOCK = ".lock"
"""Held by the process that runs the study; the file stays, and tells one folder from another of the same name."""


@dataclass
class Totals:
    """What all trials of a study come to, those that were pruned, failed or interrupted too.

    Those that took another one's result were not `begun`. Seconds are summed exactly: a study that is taken up again
    counts its records in another order.
    """

    begun: int = 0
    epochs: int = 0
    exact_device_seconds: Fraction = Fraction()

    @property
    def device_seconds(self) -> float:
        """What they have cost."""
        return float(self.exact_device_seconds)

    def count(self, record: TrialRecord, times: int) -> None:
        """Add a record, or with -1 take it out again."""
        self.begun += times * (record.same_as is None)
        self.epochs += times * len(record.epochs)
        self.exact_device_seconds += times * Fraction(record.cost_with_lost.device_seconds)


class Ledger:
    """The record of one study on disk, held by one process at a time.

    Raises:
        StudytoolError: another process runs the study, its results were made with other settings, or its files are
            damaged beyond the previous generation.

    `notes` are lines that a person should read: what has changed since the study was begun, though it may go on.
    """

    def __init__(self, spec: StudySpec, data_fingerprint: str) -> None:
        self.folder = spec.folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = take_lock(self.folder)
        self.storage: Storage | None = None
        self._lease: Lease | None = None
        self._heartbeat: Heartbeat | None = None
        self._records: dict[str, TrialRecord] = {}
        self._by_arm: dict[str, dict[str, TrialRecord]] = {}
        self._open: dict[str, TrialRecord] = {}
        self.totals = Totals()
        self.notes: tuple[str, ...] = ()
        try:
            if spec.storage_address is not None:
                self._lease = Lease(spec.storage_address)
                self.storage = Storage(spec.storage_address, self.folder, before_retry=self._lease.look_and_check)
                self.storage.pull(without=HEAVY)
            else:
                wait_for_another(self.folder)
            self._header = self._open_header(_what_results_depend_on(spec, data_fingerprint))
            self.uid: str = self._header["uid"]
            _refuse_lost_records(self.folder)
            if spec.storage_address is None:
                self._heartbeat = Heartbeat(self.folder)
            for path in record_files(self.folder):
                self._keep(read_record(path, mend=True))
            if self._header.get("begun") and not self._records:
                raise StudytoolError(
                    f"{self.folder / 'trials'}: holds no trial, although the study had begun; put the folder back from "
                    "a backup, or begin the study anew with --new"
                )
            self.notes += tuple(
                f"{arm}: search trial {number} is gone; it is run again"
                for arm, number in gaps([*self._records.values()])
            )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let another process have the study."""
        if self._lease is not None:
            self._lease.close()
        if self._heartbeat is not None:
            self._heartbeat.close()
        self._lock.close()

    @property
    def records(self) -> tuple[TrialRecord, ...]:
        """Every trial so far: search before confirm, then by arm and number. It takes the longer the more there are."""
        return in_order(self._records.values())

    def of_arm(self, arm: str) -> tuple[TrialRecord, ...]:
        """Every trial of an arm so far: search before confirm, then by number."""
        return in_order(self._by_arm.get(arm, {}).values())

    @property
    def without_outcome(self) -> Collection[TrialRecord]:
        """The trials that were begun and have not ended."""
        return self._open.values()

    def get(self, trial_id: str) -> TrialRecord | None:
        """The record of a trial, or None if it was never started."""
        return self._records.get(trial_id)

    def trial_folder(self, trial_id: str) -> Path:
        """Where a trial keeps its checkpoints and its log."""
        return self.folder / "trials" / trial_id

    def put(self, record: TrialRecord) -> TrialRecord:
        """Write a record, whole; it replaces the one with the same trial id."""
        name = f"trials/{record.trial_id}/record.json"
        self._write(name, to_dict(record))
        if record.outcome is not None:
            copy_to_previous(self.folder / name)
        self._keep(record)
        if not self._header.get("begun"):  # from now on a study without trials is one that has lost them
            self._header = {**self._header, "begun": True}
            self._write("study.json", self._header)
        return record

    def note(self, record: TrialRecord) -> None:
        """Keep a record that is written with the trial's next change: for what could be found out again."""
        self._keep(record)

    def add_epoch(
        self, trial_id: str, result: EpochResult, device: DeviceInfo | None = None, outcome: Outcome | None = None
    ) -> TrialRecord:
        """Append an epoch to a trial's record, in one write with the device and, if the trial ends with it, how."""
        record = self._records[trial_id]
        record = replace(record, epochs=(*record.epochs, result), device=device or record.device)
        return self.put(record if outcome is None else self._ended(record, outcome))

    def replace_epoch(self, trial_id: str, result: EpochResult, device: DeviceInfo | None = None) -> TrialRecord:
        """Put an epoch that had to be trained again in its place, and count what it took the first time as lost.

        The epochs after it, which will come again too, keep what each of them took.
        """
        record, k = self._records[trial_id], result.epoch - 1
        before, first = record.epochs[k - 1].cost if k else Cost(), record.epochs[k].cost
        later = (replace(epoch, cost=result.cost + epoch.cost.since(first)) for epoch in record.epochs[k + 1 :])
        lost = record.lost_device_seconds + first.since(before).device_seconds
        epochs = (*record.epochs[:k], result, *later)
        return self.put(replace(record, epochs=epochs, device=device or record.device, lost_device_seconds=lost))

    def add_lost(self, trial_id: str, device_seconds: float) -> None:
        """Count what an epoch of a trial took that broke off."""
        record = self._records[trial_id]
        if device_seconds > 0:
            self.put(replace(record, lost_device_seconds=record.lost_device_seconds + device_seconds))

    def end(self, trial_id: str, outcome: Outcome, message: str = "") -> TrialRecord:
        """Set how a trial ended; a complete one is held by the checksum of its weights."""
        return self.put(self._ended(self._records[trial_id], outcome, message))

    def _ended(self, record: TrialRecord, outcome: Outcome, message: str = "") -> TrialRecord:
        record = replace(record, outcome=outcome, message=message)
        if outcome is not Outcome.COMPLETE:
            return record
        if self.storage is not None:
            self.storage.fetch(f"trials/{record.trial_id}/best.json")
        return replace(record, checkpoint_sha256=_checksum_of_weights(self.trial_folder(record.trial_id)))

    @property
    def choices(self) -> Choices | None:
        """What `auto` means in the study; None before it was chosen."""
        return Choices(**self._header["choices"]) if "choices" in self._header else None

    def keep_choices(self, choices: Choices) -> None:
        """Write down what `auto` means in the study, for good."""
        self._header = {**self._header, "choices": asdict(choices)}
        self._write("study.json", self._header)

    def _keep(self, record: TrialRecord) -> None:
        """Keep what is asked after every epoch up to date, so that no answer has to look at every trial."""
        before = self._records.get(record.trial_id)
        if before is not None:
            self.totals.count(before, -1)
        self.totals.count(record, 1)
        self._records[record.trial_id] = record
        self._by_arm.setdefault(record.arm, {})[record.trial_id] = record
        self._open.pop(record.trial_id, None)
        if record.outcome is None:
            self._open[record.trial_id] = record

    def _write(self, name: str, content: dict[str, Any]) -> None:
        if self._lease is not None:
            self._lease.check()
        if not _is_lock_of(self.folder, self._lock):
            raise StudytoolError(
                f"{self.folder}: was moved, removed or replaced while the study ran; what it has found until now is "
                "where the folder is; put it back, and the same command goes on"
            )
        write_state(self.folder / name, content)
        if self.storage is not None:
            self.storage.push(name)

    def _open_header(self, settings: dict[str, Any]) -> dict[str, Any]:
        path = self.folder / "study.json"
        if not path.exists() and not path.with_name("study.json.previous").exists():
            if any(self.folder.glob("trials/*/record.json")):
                raise StudytoolError(
                    f"{path}: missing, although {self.folder / 'trials'} holds results; put it back from a backup, "
                    "or give the study another name"
                )
            header = {"format": FORMAT, "uid": uuid.uuid4().hex, "program": _program(), "settings": settings}
            self._write(path.name, header)
            return header
        header = read_state(path, mend=True)
        if header.get("format") != FORMAT:
            raise StudytoolError(
                f"{path}: format {header.get('format')} is not known to this version, which writes {FORMAT}; "
                "update studytool"
            )
        return self._take_up(path, header, settings)

    def _take_up(self, path: Path, header: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
        """Hold the settings of a study that is there already against those it is run with now; its new header."""
        unknown = sorted({*header["settings"]} - {*settings})
        if unknown:
            raise StudytoolError(
                f"{path}: the study was begun with a later studytool ({header.get('program', 'unknown')}), which knows "
                f"{unknown[0]}; update studytool"
            )
        # What a version before this one did not know yet, it did as the default says.
        before = {**_defaults(settings), **header["settings"]}
        forbidden = first_forbidden_change(before, settings)
        if forbidden is not None:
            raise StudytoolError(
                f"{self.folder}: the results there were made with {forbidden}; give the study another name "
                "(--set name=…), or begin it anew with --new, which puts the old results aside"
            )
        notes = []
        made_by = header.get("program", "0.1.0")
        if made_by != _program():
            notes.append(f"the study was begun with studytool {made_by}, this is {_program()}: compare with care")
        if before != settings:
            notes.append(
                "the search space is wider than before: older trials count, further ones are drawn from the whole of it"
                " (search.trials_per_arm says how many there are in all)"
            )
            header = {**header, "settings": settings}
            self._write(path.name, header)
        self.notes = tuple(notes)
        return header


def set_aside(spec: StudySpec) -> Path | None:
    """Move what is there of a study to a name of its own, so that it is begun anew; that name, or None if none was.

    MLflow's files stay, since its store names them by their path; its runs belong to the old study by their `uid`.

    Raises:
        StudytoolError: another process runs the study.
    """
    if spec.storage_address is not None:
        raise StudytoolError(
            f"{spec.storage_address}: --new cannot put results at an address aside; give the study another name "
            "(--set name=…)"
        )
    folder = spec.folder.absolute()
    if not folder.exists():
        return None
    with take_lock(folder):
        number = 1
        while (aside := folder.with_name(f"{folder.name}.before-{number}")).exists():
            number += 1
        folder.rename(aside)
        if (aside / "mlflow").exists():
            folder.mkdir(mode=0o700)
            (aside / "mlflow").rename(folder / "mlflow")
    return aside


def gaps(records: Sequence[TrialRecord]) -> list[tuple[str, int]]:
    """Search trials, as arm and number, whose folders were removed although later ones of their arm are there."""
    there: dict[str, set[int]] = {}
    for record in records:
        if record.phase == "search":
            there.setdefault(record.arm, set()).add(record.number)
    return [(arm, number) for arm, numbers in there.items() for number in range(max(numbers)) if number not in numbers]


def _refuse_lost_records(folder: Path) -> None:
    """A trial that has left something else than a record was there; it must not be begun again in silence."""
    for trial in sorted(folder.glob("trials/*")):
        left = [path.name for path in trial.glob("[!.]*") if not path.name.endswith(".linking")]
        if left and not any(name.startswith("record.json") for name in left):
            raise StudytoolError(
                f"{trial / 'record.json'}: missing, although {left[0]} is there; put it back from a backup, or delete "
                "the trial's folder to run that trial again"
            )


def _checksum_of_weights(folder: Path) -> str:
    """What `best.json` says of the selected weights; empty if there are none."""
    try:
        return str(json.loads((folder / "best.json").read_text(encoding="utf-8"))["sha256"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def _program() -> str:
    return metadata.version("studytool")


def _what_results_depend_on(spec: StudySpec, data_fingerprint: str) -> dict[str, Any]:
    """What must not change under existing results; arms, trials per arm and seeds may grow."""
    dump = spec.model_dump(mode="json", include={"seed", "model", "input", "train", "metric", "search"})
    flat = {
        f"{section}.{k}": v
        for section in ("model", "input", "train", "metric", "search")
        for k, v in dump[section].items()
    }
    del flat["search.trials_per_arm"], flat["metric.target"]
    for name in HANDLING:
        flat.pop(f"train.{name}", None)
    return json.loads(json.dumps({"seed": spec.seed, "data": data_fingerprint, **flat}))  # type: ignore[no-any-return]


def _defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """The defaults of what results depend on, but for what no study can do without."""
    plain = StudySpec.model_validate({"name": "defaults", "data": {"path": "none"}})
    return {key: value for key, value in _what_results_depend_on(plain, "").items() if key in settings}


def take_lock(folder: Path) -> IO[str]:
    """Hold a study's folder until the file is closed (StudytoolError: another process of this machine holds it)."""
    while True:
        handle = (folder / LOCK).open("w")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.close()
            raise StudytoolError(f"{folder}: this study is already running in another process") from error
        if _is_lock_of(folder, handle):
            return handle
        handle.close()  # the folder was put aside in this moment


def _is_lock_of(folder: Path, handle: IO[str]) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), (folder / LOCK).stat())
    except FileNotFoundError:
        return False
