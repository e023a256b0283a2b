"""A study's folder as something to come back to: the study file and the environment kept in it, and how it is found."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from studytool.errors import SpecError, StudytoolError
from studytool.files import write_json, write_text
from studytool.remote import is_remote
from studytool.settings import TrackingSettings
from studytool.spec import StudySpec, load_study
from studytool.study.ledger import take_lock
from studytool.study.storage import CHECKPOINTS, Storage
from studytool.study.tracking.store import absolute_uri

STUDY_FILE, ENVIRONMENT = "study.yaml", "environment.json"
_HEADER = "# This study as it was run last, with every --set in its place. `studytool report` reads it.\n"


def keep_study(spec: StudySpec, environment: Mapping[str, str]) -> None:
    """Write the study file with its overrides, and what it is run with, into the study's folder."""
    values = spec.model_dump(mode="json", exclude_unset=True)
    values["data"]["path"] = _from_anywhere(spec.data.path)
    values["tracking"] = {**values.get("tracking", {}), "uri": absolute_uri(spec.tracking.uri)}
    write_text(spec.folder / STUDY_FILE, _HEADER + yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    write_json(spec.folder / ENVIRONMENT, dict(environment))


def find_study(study: str, overrides: Sequence[str] = (), *, tracking_uri: str | None = None) -> StudySpec:
    """The study that a text means: a study file, a study's folder, a name under `studies/`, or an MLflow experiment.

    The tracking store (default: that of study files which name none) is asked only if nothing else is there.

    Raises:
        SpecError: nothing is there under that name, or its study file is not one.
    """
    path = Path(study)
    if path.is_file():
        return _brought_here(load_study(path, overrides))
    for folder in (path, Path(str(StudySpec.model_fields["output"].default)) / study):
        if folder.is_dir():
            return _study_of(folder, overrides)
    if path.suffix in (".yaml", ".yml"):
        raise SpecError(f"{path}: no such study file")
    from studytool.study.tracking.lookup import folder_of_experiment

    kept = folder_of_experiment(tracking_uri or str(TrackingSettings.model_fields["uri"].default), study)
    if kept is not None:
        return _study_of(kept, overrides)
    raise SpecError(
        f"{study}: no study file, no study's folder, no study under studies/ and no MLflow experiment of that name; "
        "give the YAML file or the folder that `studytool run` has written"
    )


def read_environment(folder: Path) -> dict[str, str]:
    """What the study was run with the last time; empty where that is not kept."""
    try:
        content: dict[str, Any] = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(name): str(value) for name, value in content.items()}


def _study_of(folder: Path, overrides: Sequence[str]) -> StudySpec:
    kept = folder / STUDY_FILE
    folder = folder.absolute()
    if not kept.is_file():
        raise StudytoolError(f"{folder}: holds no {STUDY_FILE}; give the study file it was run from instead")
    here = [f"output={json.dumps(str(folder.parent))}", f"name={json.dumps(folder.name)}"]  # it may have been moved
    return load_study(kept, [*here, *overrides])


def _brought_here(spec: StudySpec) -> StudySpec:
    """The same study; of one at an address, what is there has been copied to this machine."""
    if spec.storage_address is None:
        return spec
    folder = spec.folder
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        lock = take_lock(folder)
    except StudytoolError:
        return spec  # its driver runs on this machine: the working copy is the latest
    with lock:
        Storage(spec.storage_address, folder).pull(without=CHECKPOINTS)
    return spec


def _from_anywhere(path: str) -> str:
    """An address as it is, a folder from the root, so that the study can be opened from any folder."""
    return path if is_remote(path) else str(Path(path).absolute())
