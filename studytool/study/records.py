"""A study's files on disk: each with a checksum, the generation before it beside it, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from studytool.errors import StudytoolError
from studytool.files import disk_full_explained, write_json
from studytool.results import TrialRecord, trial_from_dict
from studytool.spec import TrialSpec
from studytool.study.choices import Choices


def new_record(trial: TrialSpec, data_fingerprint: str) -> TrialRecord:
    """The record of a trial that nobody has tried yet."""
    return TrialRecord(
        attempts=0,
        trial_id=trial.trial_id,
        arm=trial.arm,
        phase=trial.phase,
        number=trial.number,
        source=trial.source,
        seed=trial.seed,
        # As JSON knows them: a tuple would come back from the ledger as a list.
        parameters={name: list(v) if isinstance(v, tuple) else v for name, v in trial.parameters.items()},
        config_hash=trial.config_hash(data_fingerprint),
    )


def read_records(folder: Path) -> tuple[TrialRecord, ...]:
    """The records of a study that may be running, in the order of `Ledger.records`: read only, no lock taken."""
    return in_order([read_record(path) for path in record_files(folder)])


def in_order(records: Collection[TrialRecord]) -> tuple[TrialRecord, ...]:
    """Search before confirm, then by arm and number."""
    return tuple(sorted(records, key=lambda r: (r.phase != "search", r.arm, r.number)))


def read_uid(folder: Path) -> str | None:
    """The id of the study in a folder, if one can be read there."""
    try:
        return str(read_state(folder / "study.json")["uid"])
    except (StudytoolError, LookupError):
        return None


def read_choices(folder: Path) -> Choices | None:
    """What `auto` means in a study that may be running; None if nothing was chosen yet. No lock is taken."""
    if not (folder / "study.json").is_file():
        return None
    choices = read_state(folder / "study.json").get("choices")
    return Choices(**choices) if choices else None


def read_record(path: Path, *, mend: bool = False) -> TrialRecord:
    """The record of one trial (StudytoolError: damaged, or of another version); see `read_state` for `mend`."""
    content = read_state(path, mend=mend)
    try:
        return trial_from_dict(content)
    except (TypeError, KeyError, ValueError) as error:
        raise StudytoolError(
            f"{path}: was written by another version of studytool ({type(error).__name__}: {error}); update studytool"
        ) from error


def record_files(folder: Path) -> list[Path]:
    """Every trial's record, also one that only its previous generation is left of."""
    return sorted({path.with_name("record.json") for path in folder.glob("trials/*/record.json*")})


def write_state(path: Path, content: dict[str, Any]) -> None:
    """Write a file of JSON with its checksum; the one that was there becomes the generation before it."""
    with disk_full_explained(path):
        _keep_previous(path)
    write_json(path, {"sha256": _digest(content), "content": content})


def _keep_previous(path: Path) -> None:
    if path.exists():
        spare = path.with_name(path.name + ".previous")
        temporary = path.with_name(path.name + ".linking")
        temporary.unlink(missing_ok=True)
        os.link(path, temporary)
        temporary.replace(spare)


def copy_to_previous(path: Path) -> None:
    """Let the generation before a file hold what the file does: whichever is damaged later, nothing of it is lost.

    It is not waited for until it is on the disk, as the file itself is.
    """
    with disk_full_explained(path):
        temporary = path.with_name(path.name + ".linking")
        shutil.copyfile(path, temporary)
        temporary.replace(path.with_name(path.name + ".previous"))


def read_state(path: Path, *, mend: bool = False) -> dict[str, Any]:
    """What `write_state` wrote last, or before that where the last is damaged (StudytoolError: both are).

    With `mend` a damaged file is replaced then: the next write would make it the generation before.
    """
    problems: list[str] = []
    for candidate in (path, path.with_name(path.name + ".previous")):
        try:
            stored = json.loads(candidate.read_text(encoding="utf-8"))
            content: dict[str, Any] = stored["content"]
            if stored["sha256"] == _digest(content):
                if mend and problems:
                    write_json(path, stored)
                return content
            problems.append("its checksum does not match")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            problems.append(f"{type(error).__name__}: {error}".splitlines()[0])
    raise StudytoolError(
        f"{path}: damaged ({problems[0]}), and so is the generation before it ({problems[1]}); "
        "put the file back from a backup, or delete the trial's folder to run that trial again"
    )


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
