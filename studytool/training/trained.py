"""`best.safetensors` and `best.json`: the selected weights of a trial, and all that is needed to use them.

Both are written when the trial has had its last epoch.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from studytool.data.preparation import Preparation
from studytool.errors import WeightsError
from studytool.files import read_with_sha256, sha256_of, whole_file, write_json
from studytool.models.adapt import StagedModel
from studytool.models.build import build_model
from studytool.results import EpochResult, epoch_from_dict, to_dict
from studytool.spec import TrialSpec

WEIGHTS = "best.safetensors"
RECORD = "best.json"
FORMAT = 1
_PREPARATION: TypeAdapter[Preparation | None] = TypeAdapter(Preparation | None)


@dataclass(frozen=True)
class BestRecord:
    """What `best.json` says about `best.safetensors`: which trial and epoch, and what the network takes and gives.

    `result` is the selected epoch; its `test` is filled in when a trial of the confirm phase has ended. `sha256` is
    that of the weights, empty while there are none.
    `precision` is the number format that "auto" meant where the trial ran. `preparation` says what was done to the
    volumes before they became the dataset; None in files of older versions.
    """

    trial: TrialSpec
    classes: tuple[str, ...]
    volume_shape_dhw: tuple[int, int, int]
    voxel_size_angstrom: float
    data_fingerprint: str
    precision: str
    result: EpochResult
    sha256: str = ""
    preparation: Preparation | None = None


@dataclass(frozen=True)
class Trained:
    """A trained network, in eval mode on the CPU, with its record."""

    model: StagedModel
    record: BestRecord

    @property
    def trial(self) -> TrialSpec:
        """How it was trained."""
        return self.record.trial

    @property
    def classes(self) -> tuple[str, ...]:
        """What its outputs mean, in order."""
        return self.record.classes


def load_trained(folder: Path) -> Trained:
    """The network of a trial's folder with its selected weights; no pre-trained weights are needed for it.

    Raises:
        WeightsError: there is none, or a file is damaged or does not fit the other one.
    """
    record = read_best(folder)
    # The weights come from the file, and nothing is trained: initialization and freezing do not matter any more.
    settings = record.trial.model.model_copy(update={"init": "random", "freeze": "none"})
    model = build_model(
        settings, num_classes=len(record.classes), volume_shape_dhw=record.volume_shape_dhw, seed=record.trial.seed
    )
    load_best_weights(folder, record, model)
    return Trained(model.eval(), record)


def save_best(folder: Path, model: torch.nn.Module, record: BestRecord) -> BestRecord:
    """Write the model's weights and then, as the proof that they are whole, the record with their SHA-256; gives it."""
    weights = folder / WEIGHTS
    tensors = {
        name: torch.clone(tensor.detach().cpu(), memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }
    with whole_file(weights) as temporary:
        save_file(tensors, temporary)
    record = replace(record, sha256=sha256_of(weights))
    save_record(folder, record)
    return record


def save_record(folder: Path, record: BestRecord) -> None:
    """Write `best.json`."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "sha256": record.sha256,
        "classes": list(record.classes),
        "volume_shape_dhw": list(record.volume_shape_dhw),
        "voxel_size_angstrom": record.voxel_size_angstrom,
        "preparation": None if record.preparation is None else asdict(record.preparation),
        "precision": record.precision,
        "data_fingerprint": record.data_fingerprint,
        "config_hash": record.trial.config_hash(record.data_fingerprint),
        "result": to_dict(record.result),
        "trial": record.trial.model_dump(mode="json"),
    }
    write_json(folder / RECORD, content)


def read_best(folder: Path) -> BestRecord:
    """The record of a trial's selected weights (WeightsError if there is none or it cannot be used)."""
    path = folder / RECORD
    if not path.exists():
        raise WeightsError(f"{folder}: no {RECORD} there; give the folder of a trial that has ended")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise WeightsError(f"{path}: format {content['format']!r} is not of this version of studytool ({FORMAT})")
        depth, height, width = (int(side) for side in content["volume_shape_dhw"])
        return BestRecord(
            trial=TrialSpec.model_validate_json(json.dumps(content["trial"])),
            classes=tuple(map(str, content["classes"])),
            volume_shape_dhw=(depth, height, width),
            voxel_size_angstrom=float(content["voxel_size_angstrom"]),
            data_fingerprint=str(content["data_fingerprint"]),
            precision=str(content["precision"]),
            result=epoch_from_dict(content["result"]),
            sha256=str(content["sha256"]),
            preparation=_PREPARATION.validate_python(content.get("preparation")),
        )
    except ValidationError as error:
        raise WeightsError(
            f"{path}: its trial is not one of this version of studytool ({error.errors()[0]['msg']})"
        ) from error
    except (ValueError, TypeError, LookupError) as error:
        raise WeightsError(f"{path} is damaged ({type(error).__name__}: {error})") from error


def load_best_weights(folder: Path, record: BestRecord, model: torch.nn.Module) -> None:
    """Put the selected weights into `model`, after checking that they are the ones the record is about."""
    weights = folder / WEIGHTS
    if not record.sha256:
        raise WeightsError(f"{folder}: the trial has not ended, and its weights are not written yet; let it go on")
    if not weights.exists():
        raise WeightsError(f"{weights} is missing; remove {folder} to train the trial again")
    content, found = read_with_sha256(weights)
    if found != record.sha256:
        raise WeightsError(
            f"{weights} is damaged: its SHA-256 is not the one in {RECORD}; remove {folder} to train again"
        )
    try:
        model.load_state_dict(load(content))
    except (SafetensorError, RuntimeError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise WeightsError(f"{weights} does not fit {record.trial.model.backbone} ({first_line})") from error
