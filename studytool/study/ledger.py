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
import hashlib
import json
import os
import uuid
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from studytool.errors import StudytoolError
from studytool.files import write_json
from studytool.results import EpochResult, Outcome, TrialRecord, to_dict, trial_from_dict
from studytool.spec import StudySpec

FORMAT = 1


class Ledger:
    """The record of one study on disk, held by one process at a time.

    Raises:
        StudytoolError: another process runs the study, its results were made with other settings, or its files are
            damaged beyond the previous generation.
    """

    def __init__(self, spec: StudySpec, data_fingerprint: str) -> None:
        self.folder = spec.folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = _take_lock(self.folder)
        self._records: dict[str, TrialRecord] = {}
        try:
            header = self._open_header(_what_results_depend_on(spec, data_fingerprint))
            self.uid: str = header["uid"]
            for path in _record_files(self.folder):
                record = trial_from_dict(_read(path))
                self._records[record.trial_id] = record
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let another process have the study."""
        self._lock.close()

    @property
    def records(self) -> tuple[TrialRecord, ...]:
        """Every trial so far: search before confirm, then by arm and number."""
        return tuple(sorted(self._records.values(), key=lambda r: (r.phase != "search", r.arm, r.number)))

    def get(self, trial_id: str) -> TrialRecord | None:
        """The record of a trial, or None if it was never started."""
        return self._records.get(trial_id)

    def trial_folder(self, trial_id: str) -> Path:
        """Where a trial keeps its checkpoints and its log."""
        return self.folder / "trials" / trial_id

    def put(self, record: TrialRecord) -> TrialRecord:
        """Write a record, whole; it replaces the one with the same trial id."""
        _write(self.trial_folder(record.trial_id) / "record.json", to_dict(record))
        self._records[record.trial_id] = record
        return record

    def add_epoch(self, trial_id: str, result: EpochResult) -> TrialRecord:
        """Append an epoch to a trial's record."""
        record = self._records[trial_id]
        return self.put(replace(record, epochs=(*record.epochs, result)))

    def end(self, trial_id: str, outcome: Outcome, message: str = "") -> TrialRecord:
        """Set how a trial ended."""
        return self.put(replace(self._records[trial_id], outcome=outcome, message=message))

    def _open_header(self, settings: dict[str, Any]) -> dict[str, Any]:
        path = self.folder / "study.json"
        if not path.exists() and not path.with_name("study.json.previous").exists():
            if any(self.folder.glob("trials/*/record.json")):
                raise StudytoolError(
                    f"{path}: missing, although {self.folder / 'trials'} holds results; put it back from a backup, "
                    "or give the study another name"
                )
            _write(path, {"format": FORMAT, "uid": uuid.uuid4().hex, "settings": settings})
        header = _read(path)
        if header["format"] != FORMAT:
            raise StudytoolError(
                f"{path}: format {header['format']} is not known to this version, which writes {FORMAT}"
            )
        changed = sorted(key for key, value in settings.items() if header["settings"].get(key) != value)
        if changed:
            key = changed[0]
            raise StudytoolError(
                f"{self.folder}: the results there were made with {key} = {_short(header['settings'].get(key))}, "
                f"the study file now says {_short(settings[key])}; give the study another name (--set name=…)"
            )
        return header


def read_records(folder: Path) -> tuple[TrialRecord, ...]:
    """The records of a study that may be running: read only, no lock taken."""
    return tuple(trial_from_dict(_read(path)) for path in _record_files(folder))


def _record_files(folder: Path) -> list[Path]:
    """Every trial's record, also one that only its previous generation is left of."""
    return sorted({path.with_name("record.json") for path in folder.glob("trials/*/record.json*")})


def _what_results_depend_on(spec: StudySpec, data_fingerprint: str) -> dict[str, Any]:
    """What must not change under existing results; arms, trials per arm and seeds may grow."""
    dump = spec.model_dump(mode="json", include={"seed", "model", "input", "train", "metric", "search"})
    flat = {
        f"{section}.{k}": v
        for section in ("model", "input", "train", "metric", "search")
        for k, v in dump[section].items()
    }
    del flat["search.trials_per_arm"], flat["metric.target"]
    return json.loads(json.dumps({"seed": spec.seed, "data": data_fingerprint, **flat}))  # type: ignore[no-any-return]


def _write(path: Path, content: dict[str, Any]) -> None:
    if path.exists():
        spare = path.with_name(path.name + ".previous")
        temporary = path.with_name(path.name + ".linking")
        temporary.unlink(missing_ok=True)
        os.link(path, temporary)
        temporary.replace(spare)
    write_json(path, {"sha256": _digest(content), "content": content})


def _read(path: Path) -> dict[str, Any]:
    problems = []
    for candidate in (path, path.with_name(path.name + ".previous")):
        try:
            stored = json.loads(candidate.read_text(encoding="utf-8"))
            content: dict[str, Any] = stored["content"]
            if stored["sha256"] == _digest(content):
                return content
            problems.append("its checksum does not match")
        except (OSError, ValueError, KeyError, TypeError) as error:
            problems.append(f"{type(error).__name__}: {error}".splitlines()[0])
    raise StudytoolError(
        f"{path}: damaged ({problems[0]}), and so is the generation before it ({problems[1]}); "
        "put the file back from a backup, or delete the trial's folder to run that trial again"
    )


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _take_lock(folder: Path) -> IO[str]:
    handle = (folder / ".lock").open("w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        handle.close()
        raise StudytoolError(f"{folder}: this study is already running in another process") from error
    return handle


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "…"
